"""The same inputs give the same bits: in a second call, in another process, and with another number of threads."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from digest import digests
from tiers import slow

from parity.cases import LOSSES

TESTS = pathlib.Path(__file__).parent
# sums over whole arrays, matrix products, and PyTorch's gradient of a softmax are divided among the threads
DEPENDS_ON_THREADS = {f"torch {loss.title}" for loss in LOSSES if loss.depends_on_threads}


@pytest.fixture(scope="module")
def here():
    return digests()


@slow
def test_a_second_call(here):
    assert digests() == here


@slow
def test_another_process_with_other_threads(here):
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    command = [sys.executable, "-W", "error", str(TESTS / "digest.py"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    there = json.loads(done.stdout)
    assert {k for k in here if here[k] != there[k]} <= DEPENDS_ON_THREADS
