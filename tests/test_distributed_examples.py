"""Two processes under the real engines train like one process, up to rounding."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # processes that train

ROOT = Path(__file__).parent.parent
# optimisations and threads are not worth their time for short programs with small tensors
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "OMP_NUM_THREADS": "1",
}
BOUNDS = {"float32": 1e-6, "float64": 1e-12}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def curves(folder: Path, framework: str, *commands: list[str], launcher: Sequence[str] = ()) -> list[dict]:
    """Run the script with each list of options at the same time; returns what each rank wrote."""
    script = [sys.executable, *launcher, str(ROOT / "examples" / "distributed" / f"distil_{framework}.py")]
    script += ["--accumulate", "2", "--json", str(folder)]
    started = [
        subprocess.Popen(
            [*script, *options], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for options in commands
    ]
    try:
        for process in started:
            text, _ = process.communicate(timeout=300)
            assert process.returncode == 0, text
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(list(folder.iterdir())))]


def check(ranks: list[dict], alone: dict) -> None:
    assert len(ranks) == 2
    assert ranks[0] == ranks[1]
    for dtype, bound in BOUNDS.items():
        got, want = np.array(ranks[0][dtype]), np.array(alone[dtype])
        assert len(got) == 50
        assert want[-1] < 0.97 * want[0]
        np.testing.assert_allclose(got, want, rtol=bound, atol=0)


def test_jax_distributed(tmp_path):
    (alone,) = curves(tmp_path / "alone", "jax", [])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [["--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(i)] for i in range(2)]
    check(curves(tmp_path / "two", "jax", *processes), alone)


def test_torchrun(tmp_path):
    (alone,) = curves(tmp_path / "alone", "torch", [])
    for engine in ("ddp", "fsdp"):
        check(curves(tmp_path / engine, "torch", ["--engine", engine], launcher=TORCHRUN), alone)
