"""The notebooks run from the first cell to the last, and contain the outputs of such a run."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # starts a kernel and trains
ROOT = pathlib.Path(__file__).parent.parent
NUMBER = re.compile(r"\d+\.\d+")


def read(path):
    return json.loads(path.read_text())["cells"]


def printed(cells):
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", ()))


@pytest.mark.parametrize("name", ["jax", "pytorch"])
def test_a_run_gives_what_is_kept(name, tmp_path):
    command = [sys.executable, str(ROOT / "docs" / "run_notebooks.py"), str(tmp_path), name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept, now = read(ROOT / "docs" / "notebooks" / f"{name}.ipynb"), read(tmp_path / f"{name}.ipynb")
    for old, new in zip(kept, now, strict=True):
        assert old["source"] == new["source"]
        kinds = [[(x["output_type"], *x.get("data", ())) for x in cell.get("outputs", ())] for cell in (old, new)]
        assert kinds[0] == kinds[1]
    assert NUMBER.sub("", printed(kept)) == NUMBER.sub("", printed(now))  # nothing from pip, no warning
    # in percent; another machine may round differently
    assert list(map(float, NUMBER.findall(printed(now)))) == pytest.approx(
        list(map(float, NUMBER.findall(printed(kept)))), abs=4
    )
    _, alone, *taught = map(float, NUMBER.findall(printed(now)))
    assert len(taught) == 2
    assert min(taught) > alone + 8
