"""Time in turn within one process, memory each in its own."""

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

# of the largest entry: what a product of many float32 numbers keeps, and two roundings of bfloat16
LIMITS = {"float32": 1e-3, "bfloat16": 2**-7}
ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds: the median, and the 20th and 80th percentiles."""

    median: float
    low: float
    high: float


def timings(workload: Workload, names: tuple[str, ...], seconds: float) -> dict[str, Timing]:
    """Of each form and of the `"floor"`, in turn, for some seconds; values are checked first.

    The forms that are fast run more often within a turn, so that their timer's resolution and the caches of the slow
    ones do not show.
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
            time.sleep(0.01)  # the threads of the form before stop waiting for work
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
    """Free one array of the size that a model's are, as any training does.

    The C library then keeps what smaller arrays free; before, it gives all of it back to the system after each step, and
    the pages' first touch is half of what is measured.
    """
    np.ones(30 * 2**17)


# the C library's: an array's pages are given back as it is freed, none are kept for the next
RETURN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def memory(workload: Workload, name: str) -> dict[str, int | None]:
    """Bytes that a step needs at its peak beyond its inputs: its temporaries, the gradients and a new state.

    `"resident"` is by how much a second step raises the resident memory of a fresh process, in which freed arrays
    return to the system at once. `"program"` is what the compiler says of the same: XLA's temporaries and results.
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
    """In the fresh process."""
    from benchmarks.workloads import GROWTH, WORKLOADS

    every = [*WORKLOADS, *(x for _, sizes in GROWTH.values() for x in sizes.values())]
    made = form(name, next(x for x in every if x.name == workload))
    made.step()  # compiles, and starts the libraries
    gc.collect()
    time.sleep(0.2)  # other threads free what they held
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    made.step()
    print(json.dumps({"resident": max(_status("VmHWM") - before, 0), "program": made.bytes_of_program}))


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def names_of(workload: Workload, forms: tuple[str, ...] = FORMS) -> tuple[str, ...]:
    """Of the forms, those that the workload has."""
    benchmark = workload.benchmark
    have = {"direct": benchmark.direct, "direct-compiled": benchmark.direct and benchmark.compiles}
    return tuple(x for x in forms if have.get(x, True))
