"""`python -m benchmarks`: each workload forward and backward, direct, in kdtorch, compiled, and in kdjax under jit."""

from __future__ import annotations

import argparse
import dataclasses
import json
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
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="workloads whose name has one of these texts")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="all four")
    parser.add_argument("--quick", action="store_true", help="a second a workload, and no memory")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--json", metavar="FILE", help="every figure, with versions and machine")
    parser.add_argument("--png", metavar="FILE", help="ratios as bars; growth of time and memory")
    options = parser.parse_args(arguments)
    for flag in ("json", "png"):
        try:
            check_writable(getattr(options, flag))
        except OSError as error:
            parser.error(f"argument --{flag}: cannot write {getattr(options, flag)!r}: {error.strerror}")
    chosen = [x for x in WORKLOADS if not options.only or any(text in x.name for text in options.only)]
    if not chosen:
        parser.error(
            f"argument --only: no workload has {options.only} in its name: {', '.join(x.name for x in WORKLOADS)}"
        )

    import torch

    torch.set_num_threads(options.threads)
    errors = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for workload in track(chosen, "workloads", console=errors):
        rows.append(_row(workload, tuple(options.forms), options.quick))
    growth: dict[str, Any] = {}
    if options.png and not options.quick:
        for name, (axis, sizes) in GROWTH.items():
            points = [
                {axis: size, **_row(workload, ("direct", "torch", "jax"), False, seconds=2)}
                for size, workload in track(sizes.items(), name, console=errors)
            ]
            growth[name] = {"axis": axis, "points": points}

    Console(width=None if sys.stdout.isatty() else 150).print(_table(rows))
    result = {"environment": {**environment(), "threads": options.threads}, "workloads": rows, "growth": growth}
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.png:
        from benchmarks.picture import draw

        draw(result, options.png)
    return 0


def _row(workload: Any, forms: tuple[str, ...], quick: bool, seconds: float = 8) -> dict[str, Any]:
    forms = measure.names_of(workload, forms)
    row: dict[str, Any] = {
        "workload": workload.name,
        "targets": {"torch": workload.torch, "jax": workload.jax, "memory": workload.memory},
        "seconds": {
            k: dataclasses.asdict(v) for k, v in measure.timings(workload, forms, 1 if quick else seconds).items()
        },
    }
    if not quick:
        row["memory"] = {name: measure.memory(workload, name) for name in forms}
    return row


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Milliseconds forward and backward; × is how many times faster than direct", title_justify="left"
    )
    for heading in ("workload", "floor", *FORMS, "MiB: direct", "torch", "jax (its program)"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for row in rows:
        seconds, memory = row["seconds"], row.get("memory", {})
        direct = seconds.get("direct")
        cells = [f"{1e3 * seconds['floor']['median']:.3g}"]
        for name in FORMS:
            if name not in seconds:
                cells.append("")
                continue
            text = f"{1e3 * seconds[name]['median']:.3g}"
            if direct and name != "direct":
                ratio, target = direct["median"] / seconds[name]["median"], row["targets"].get(name)
                text += f" {ratio:.3g}×" + (f" (of {target:g})" if target and ratio < target else "")
            cells.append(text)
        for name in ("direct", "torch", "jax"):
            size = memory.get(name)
            text = f"{size['resident'] / 2**20:.1f}" if size else ""
            cells.append(text + (f" ({size['program'] / 2**20:.1f})" if size and size["program"] is not None else ""))
        table.add_row(row["workload"], *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
