"""The README's code runs as printed."""

import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: re.search(r"from (kd\w+)", code).group(1))
def test_code(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=README.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    if "->" in done.stdout:
        first, last = map(float, done.stdout.split("->"))
        assert last < first


def test_the_table_names_every_loss():
    from kdjax.make_loss import PUBLISHED

    rows = re.findall(r"^\| (`.*?) \|", README.read_text(), re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(PUBLISHED)
