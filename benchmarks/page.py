"""`python -m benchmarks.page all.json one.json` prints the tables of docs/performance.md, from a run on all cores and a
run on one core."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from benchmarks.forms import FORMS

HEADS = {
    "direct": "direct",
    "direct-compiled": "direct, compiled",
    "torch": "kdtorch",
    "compiled": "kdtorch, compiled",
    "jax": "kdjax",
}


def main(paths: list[str]) -> None:
    runs = [json.loads(pathlib.Path(path).read_text())["workloads"] for path in paths]
    rows, alone = runs[0], {row["workload"]: row["seconds"] for run in runs[1:] for row in run}
    head = ["workload", "floor", *HEADS.values(), *(f"{HEADS[name]}, one core" for name in ("torch", "jax") if alone)]
    print(
        *_table(head, [[*_times(row["seconds"]), *_ratios(alone.get(row["workload"]))] for row in rows], rows), sep="\n"
    )
    print()
    measured = [row for row in rows if "memory" in row]
    print(*_table(["workload", *HEADS.values()], [_sizes(row["memory"]) for row in measured], measured), sep="\n")


def _table(head: list[str], cells: list[list[str]], rows: list[dict[str, Any]]) -> list[str]:
    lines = [[row["workload"], *x] for row, x in zip(rows, cells, strict=True)]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]


def _times(seconds: dict[str, Any]) -> list[str]:
    """The cells for milliseconds, and for how many times faster than direct."""
    cells = [f"{1e3 * seconds['floor']['median']:.3g}"]
    for name in FORMS:
        ratio = _ratio(seconds, name)
        cells.append(
            f"{1e3 * seconds[name]['median']:,.3g}{f' ({ratio})' if ratio else ''}" if name in seconds else "–"
        )
    return [f"**{cell}**" if "(0." in cell else cell for cell in cells]


def _ratios(seconds: dict[str, Any] | None) -> list[str]:
    return [_ratio(seconds, name) or "–" for name in ("torch", "jax")] if seconds else []


def _ratio(seconds: dict[str, Any], name: str) -> str:
    if name == "direct" or not {name, "direct"} <= set(seconds):
        return ""
    ratio = seconds["direct"]["median"] / seconds[name]["median"]
    return f"{ratio:.2g}×" if ratio < 100 else f"{ratio:.0f}×"


def _sizes(memory: dict[str, Any]) -> list[str]:
    """The cells for the MiB that a step adds, in bold if it is more than direct."""
    direct = memory.get("direct", {"resident": float("inf")})["resident"]
    cells = []
    for name in FORMS:
        size = memory[name]["resident"] if name in memory else None
        text = "–" if size is None else f"{size / 2**20:,.1f}"
        cells.append(f"**{text}**" if size is not None and size > direct else text)
    return cells


if __name__ == "__main__":
    main(sys.argv[1:])
