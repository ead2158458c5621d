"""Tests the sdist and the wheel: their contents, and that they work in empty environments with only one framework.

`python tests/packages.py` builds both and installs the wheel with `[jax]` and the sdist with `[torch]`.
"""

import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
IN_THE_SDIST = ["README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "constraints.txt", "pyproject.toml"]
IN_THE_SDIST += ["benchmarks/direct/kl.py", "docs/parity.md", "examples/digits.py", "tests/conftest.py"]
IN_THE_SDIST += ["tests/golden/kl.npz", "kdjax/py.typed"]
INSTALLED = """
import importlib, sys
import numpy as np
ours, other, extra = sys.argv[1:]
kd = importlib.import_module(ours)
importlib.import_module(ours + ".nn"), importlib.import_module(ours + ".interop")
assert kd.__file__.startswith(sys.prefix), kd.__file__
array = np.asarray if ours == "kdjax" else importlib.import_module("torch").tensor
student, teacher = array([[2.0, 0.0, -1.0]]), array([[1.0, 1.0, -1.0]])
assert abs(float(kd.kl_loss(student, teacher, temperature=2.0)) - 0.4095) < 1e-4
try:
    importlib.import_module(other)
except ModuleNotFoundError as error:
    assert str(error).endswith(f"pip install 'kdlosses[{extra}]'"), error
else:
    raise AssertionError(f"{other} needs nothing that {ours} does not bring")
parity = importlib.import_module("parity.__main__").main
assert parity(["--framework", ours[2:], "--loss", "mse_loss", "--dtype", "float32", "--html", sys.prefix + "/report"]) == 0
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        run(sys.executable, "-m", "build", "--quiet", "--outdir", folder, ROOT)
        (wheel,), (sdist,) = place.glob("*.whl"), place.glob("*.tar.gz")
        check_contents(wheel, sdist)
        check_installed(place / "jax", wheel, "jax", "kdjax", "kdtorch", "torch")
        check_installed(place / "torch", sdist, "torch", "kdtorch", "kdjax", "jax")


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_contents(wheel: pathlib.Path, sdist: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    version = wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in inside} == {
        "kdjax",
        "kdlosses",
        "kdtorch",
        "parity",
        f"kdlosses-{version}.dist-info",
    }
    assert {"kdjax/py.typed", "kdlosses/py.typed", "kdtorch/py.typed", "parity/py.typed", "parity/report.html"} <= set(
        inside
    )
    with tarfile.open(sdist) as archive:
        missing = {f"kdlosses-{version}/{name}" for name in IN_THE_SDIST} - set(archive.getnames())
    assert not missing, missing


def check_installed(place: pathlib.Path, archive: pathlib.Path, extra: str, ours: str, other: str, others: str) -> None:
    start = time.perf_counter()
    venv.create(place)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    run(*pip, "-c", ROOT / "constraints.txt", f"{archive}[{extra}]")
    installed = time.perf_counter()
    run(python, "-I", "-c", INSTALLED, ours, other, others)
    for program in (ours, "kdlosses"):
        assert "dkd_loss" in run(python, "-I", "-m", program)
    seconds = installed - start, time.perf_counter() - installed
    print(f"{archive.name}[{extra}]: installed in {seconds[0]:.0f} s, checked in {seconds[1]:.0f} s")


if __name__ == "__main__":
    main()
