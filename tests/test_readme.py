"""The code of the README and of the pages of docs/ runs as printed (docs/losses has its own test); the table holds."""

import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

import kdjax
import kdtorch
from docs.catalogue import FAMILIES
from kdlosses.pages import losses

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(x for x in (ROOT / "docs").rglob("*.md") if x.parent.name != "losses")]
BLOCKS = [
    pytest.param(
        textwrap.dedent(code), id=f"{page.stem}-{i}", marks=() if (page.stem, i) == ("README", 0) else pytest.mark.slow
    )
    for page in PAGES
    for i, code in enumerate(re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.S | re.M))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],  # of a compiler's own imports
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "->" in done.stdout:
        first, last = map(float, done.stdout.split("->"))
        assert last < first


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_the_table_of_families_names_and_links_every_loss(package):
    """A family is a folder of the package."""
    rows = re.findall(r"^\| (\w.*?) \| (\[.*?) \|", (ROOT / "README.md").read_text(), re.M)
    links = {family: re.findall(r"\[`(\w+)`\]\((.*?)\)", cell) for family, cell in rows}
    want = {}
    for name, loss in sorted(losses(package).items()):
        folder = loss.__module__.split(".")[1]
        want.setdefault(FAMILIES[folder], []).append((name, f"docs/losses/{name}.md"))
    assert links == want


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
