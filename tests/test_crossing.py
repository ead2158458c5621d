"""The example with teachers of the other framework, and the output of its benchmark."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_interop import ROOT
from tiers import slow

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_teachers_of_either_framework_teach_students_of_either(tmp_path):
    run("examples/crossing.py", "--quick", "--out", tmp_path)
    results = json.loads((tmp_path / "crossing.json").read_text())
    accuracy = {(x["teacher"], x["student"]): np.array(x["test_accuracies"]) for x in results}
    assert len(accuracy) == 4
    for (teacher, student), crossed in accuracy.items():
        alone = accuracy[student, student]
        assert crossed.mean() > 0.8, (teacher, student)  # a student with only 50 labels has about 0.73
        assert abs(crossed.mean() - alone.mean()) <= 2 * np.hypot(crossed.std(ddof=1), alone.std(ddof=1)) + 0.02


@slow
def test_the_benchmark_measures_every_way():
    text = run("-m", "benchmarks.interop", "--samples", 5000, "--calls", 3)
    assert text.count(" ms\n") == 12
    assert text.count("GB/s") == 8
