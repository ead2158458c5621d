"""Measures the time of all forms in turn in one process, and the memory of each form in a process of its own."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.forms import FORMS, check, floor, form
from benchmarks.workloads import Workload

# relative to the largest entry: the accuracy of a product of many float32 numbers, and two roundings of bfloat16
LIMITS = {"float32": 1e-3, "bfloat16": 2**-7}
ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Timing:
    """A time in seconds: the median, and the 20th and 80th percentiles."""

    median: float
    low: float
    high: float


def timings(workload: Workload, names: tuple[str, ...], seconds: float) -> dict[str, Timing]:
    """Time each form and the `"floor"` in turn for some seconds, after their values have been checked.

    Fast forms run more often within a turn, so that neither the timer's resolution nor the caches of slow forms affect
    their time.
    """
    _settle_allocator()
    steps: dict[str, Callable[[], Any]] = {"floor": floor(workload)}
    outcomes = {}
    for name in names:
        made = form(name, workload)
        outcomes[name] = made.outcome(made.step())
        steps[name] = made.step
    reference = outcomes.get("direct") or outcomes[names[0]]
    for name in names:
        check(f"{workload.name}, {name}", outcomes[name], reference, LIMITS[workload.benchmark.dtype])

    taken: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while (time.perf_counter() - start < seconds or len(taken["floor"]) < 5) and len(taken["floor"]) < 100:
        for name, step in steps.items():
            time.sleep(0.01)  # until the threads of the previous form stop waiting for work
            if not taken[name] or taken[name][-1] < 0.05:
                step()
            again = 0.0
            while again < 0.02 and (again == 0.0 or len(taken[name]) < 2000):
                before = time.perf_counter()
                step()
                once = time.perf_counter() - before
                taken[name].append(once)
                again += once
    return {name: Timing(*(float(np.percentile(x, p)) for p in (50, 20, 80))) for name, x in taken.items()}


def _settle_allocator() -> None:
    """Free one array of the size of a model's arrays, as happens in any training.

    After that, the C library keeps the memory that smaller arrays free. Before that, it returns the memory to the
    system after each step, and the page faults of the next step are half of the measured time.
    """
    np.ones(30 * 2**17)


# settings of the C library: the pages of an array are returned to the system as soon as it is freed
RETURN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def memory(workload: Workload, name: str) -> dict[str, int | None]:
    """The peak bytes that a step needs in addition to its inputs: temporaries, gradients and a new state.

    `"resident"` is the increase of a fresh process's resident memory in a second step, where freed arrays return to the
    system at once. `"program"` is the same by the compiler's account: XLA's temporaries and results.
    """
    code = f"from benchmarks.measure import print_memory; print_memory({workload.name!r}, {name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=os.environ | RETURN_PAGES,
    )
    if done.returncode:
        raise RuntimeError(f"{workload.name}, {name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_memory(workload: str, name: str) -> None:
    """Measure and print the memory, in the fresh process."""
    from benchmarks.workloads import GROWTH, WORKLOADS

    every = [*WORKLOADS, *(x for _, sizes in GROWTH.values() for x in sizes.values())]
    made = form(name, next(x for x in every if x.name == workload))
    made.step()  # compiles, and loads the libraries
    gc.collect()
    time.sleep(0.2)  # until other threads have freed their memory
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    made.step()
    print(json.dumps({"resident": max(_status("VmHWM") - before, 0), "program": made.bytes_of_program}))


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def names_of(workload: Workload, forms: tuple[str, ...] = FORMS) -> tuple[str, ...]:
    """Those of the forms that the workload has."""
    benchmark = workload.benchmark
    have = {"direct": benchmark.direct, "direct-compiled": benchmark.direct and benchmark.compiles}
    return tuple(x for x in forms if have.get(x, True))
