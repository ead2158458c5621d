"""The code of the README and of the pages of docs/ runs as printed; that of docs/losses has its own test."""

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(x for x in (ROOT / "docs").rglob("*.md") if x.parent.name != "losses")]
BLOCKS = [
    pytest.param(textwrap.dedent(code), id=f"{page.stem}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.S | re.M))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    if "->" in done.stdout:
        first, last = map(float, done.stdout.split("->"))
        assert last < first


def test_the_table_names_every_loss():
    from kdjax.make_loss import PUBLISHED

    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(), re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(PUBLISHED)
