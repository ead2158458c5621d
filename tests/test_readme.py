"""The code in the README and in docs/ runs as printed (docs/losses has its own test); the README's table is
complete."""

import json
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
from tiers import only

import kdjax
import kdtorch
from docs.catalogue import FAMILIES
from kdlosses.pages import losses

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(x for x in (ROOT / "docs").rglob("*.md") if x.parent.name != "losses")]
CODE = {str(x.relative_to(ROOT)): re.findall(r"^ *```python\n(.*?)^ *```", x.read_text(), re.S | re.M) for x in PAGES}
# runs each block as its own program, but imports only once, because that takes most of the time
RUN = """
import contextlib, io, json, sys
printed = []
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, code.strip().splitlines()[0], "exec"), {"__name__": "__main__"})
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@pytest.mark.parametrize("page", only("README.md".__eq__, [x for x in CODE if CODE[x]]))
def test_code(page):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", RUN],  # of a compiler's own imports
        input=json.dumps([textwrap.dedent(code) for code in CODE[page]]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for printed in json.loads(done.stdout.splitlines()[-1]):
        if "->" in printed:
            first, last = map(float, printed.split("->"))
            assert last < first


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_the_table_of_families_names_and_links_every_loss(package):
    """Each family is a folder of the package."""
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
