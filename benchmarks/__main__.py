"""`python -m benchmarks` measures each workload, forward and backward, in five forms: the direct form and kdtorch, both
eager and compiled, and kdjax under jit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import measure
from benchmarks.forms import FORMS
from benchmarks.workloads import GROWTH, WORKLOADS
from parity.report import check_writable, environment


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="workloads whose name contains one of these texts")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="default: all five")
    parser.add_argument("--quick", action="store_true", help="two seconds per workload, without memory")
    parser.add_argument("--threads", type=int, help="threads and cores for both frameworks (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write all figures, with versions and machine")
    parser.add_argument(
        "--png",
        metavar="FILE",
        help="draw the ratios, and how time and memory grow; FILE_phone is for a narrow screen",
    )
    options = parser.parse_args(arguments)
    if options.threads is not None and options.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {options.threads}")
    if options.png and "direct" not in options.forms:
        parser.error("argument --png: shows ratios to the direct form; leave it among --forms")
    texts = options.only or [""]
    if unknown := [text for text in texts if not any(text in x.name for x in WORKLOADS)]:
        parser.error(f"argument --only: no workload has {unknown} in its name: {', '.join(x.name for x in WORKLOADS)}")
    chosen, growing = (
        {name: x for name, x in table.items() if any(text in name for text in texts)}
        for table in ({x.name: x for x in WORKLOADS}, GROWTH)
    )
    for flag in ("json", "png"):
        try:
            check_writable(getattr(options, flag))
        except OSError as error:
            parser.error(f"argument --{flag}: cannot write {getattr(options, flag)!r}: {error.strerror}")

    if options.threads:  # before JAX starts and uses all cores that are allowed
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import torch

    torch.set_num_threads(options.threads or torch.get_num_threads())
    errors = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for workload in track(chosen.values(), "workloads", console=errors):
        rows.append(_row(workload, tuple(options.forms), options.quick))
    growth: dict[str, Any] = {}
    if options.png and not options.quick:
        for name, (axis, sizes) in growing.items():
            points = [
                {axis: size, **_row(workload, ("direct", "torch", "jax"), False, seconds=2)}
                for size, workload in track(sizes.items(), name, console=errors)
            ]
            growth[name] = {"axis": axis, "points": points}

    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(*tables(rows, options.forms, console.width))
    result = {"environment": {**environment(), "threads": torch.get_num_threads()}, "workloads": rows, "growth": growth}
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.png:
        from benchmarks.picture import draw

        path = pathlib.Path(options.png)
        draw(result, str(path))
        draw(result, str(path.with_stem(f"{path.stem}_phone")), phone=True)
    return 0


def _row(workload: Any, forms: tuple[str, ...], quick: bool, seconds: float = 8) -> dict[str, Any]:
    forms = measure.names_of(workload, forms)
    row: dict[str, Any] = {
        "workload": workload.name,
        "targets": {name: getattr(workload.benchmark, name) for name in ("torch", "jax", "memory")},
        "seconds": {
            k: dataclasses.asdict(v) for k, v in measure.timings(workload, forms, 2 if quick else seconds).items()
        },
    }
    if not quick:
        row["memory"] = {name: measure.memory(workload, name) for name in forms}
    return row


def tables(rows: list[dict[str, Any]], forms: Sequence[str], width: int) -> list[Table]:
    """The tables of time and, if measured, of memory; in a narrow terminal each number of a cell has its own line."""
    gap = " " if width >= 140 else "\n"
    titles = (
        "Milliseconds, forward and backward; ×: how many times faster than direct",
        "MiB that a step adds at its peak; in brackets: by JAX's compiler",
    )
    narrow = gap == "\n"
    times, memories = (
        Table(title=x, title_justify="left", show_lines=narrow, padding=(0, int(not narrow))) for x in titles
    )
    longest = max(len(word) for row in rows for word in row["workload"].split())
    for table, headings in ((times, ("workload", "floor", *forms)), (memories, ("workload", *forms))):
        for heading in headings:
            first = heading == "workload"
            table.add_column(
                heading.replace("-", " "),
                justify="left" if first else "right",
                overflow="fold",
                min_width=longest if first else None,
            )
    for row in rows:
        seconds, memory = row["seconds"], row.get("memory", {})
        direct = seconds.get("direct")
        cells = [f"{1e3 * seconds['floor']['median']:.3g}"]
        for name in forms:
            parts = [f"{1e3 * seconds[name]['median']:.3g}"] if name in seconds else []
            if direct and parts and name != "direct":
                ratio, target = direct["median"] / seconds[name]["median"], row["targets"].get(name)
                parts += [f"{ratio:.3g}×", *([f"(of {target:.3g})"] if target and ratio < target else [])]
            cells.append(gap.join(parts))
        times.add_row(row["workload"], *cells)
        sizes = [memory.get(name, {"resident": None, "program": None}) for name in forms]
        texts = [[f"{x / 2**20:.1f}" for x in (size["resident"], size["program"]) if x is not None] for size in sizes]
        memories.add_row(row["workload"], *(gap.join([*text[:1], *(f"({x})" for x in text[1:])]) for text in texts))
    return [times, memories] if any("memory" in row for row in rows) else [times]


if __name__ == "__main__":
    sys.exit(main())
