"""Draws the picture of a run: ratios as bars, and how time and memory grow."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib.pyplot as plt

COLOURS = {
    "direct": "#888888",
    "direct-compiled": "#bbbbbb",
    "torch": "#d9542c",
    "compiled": "#e8a33d",
    "jax": "#2f6fb3",
}
NAMES = {
    "direct": "direct",
    "direct-compiled": "direct, compiled",
    "torch": "kdtorch",
    "compiled": "kdtorch, compiled",
    "jax": "kdjax, jit",
}


def draw(result: dict[str, Any], path: str, phone: bool = False) -> None:
    growth = result["growth"]
    rows = [row for row in result["workloads"] if "direct" in row["seconds"]]
    names = [name for name in NAMES if name != "direct"]
    wide, tall, columns = 3.9 if phone else 8.6, 1.5 + 0.33 * len(rows), 1 if phone else max(len(growth), 1)
    lines = 2 * -(-len(growth) // columns)
    figure = plt.figure(figsize=(wide, tall + 2.6 * lines), layout="constrained")
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[tall] + [2.6] * lines)

    bars = figure.add_subplot(grid[0, :])
    for i, name in enumerate(names):
        ratios = [
            row["seconds"]["direct"]["median"] / row["seconds"][name]["median"] if name in row["seconds"] else 0
            for row in rows
        ]
        places = [x + 0.2 * (i - (len(names) - 1) / 2) for x in range(len(rows))]
        bars.barh(places, ratios, 0.18, color=COLOURS[name], label=NAMES[name])
    bars.axvline(1, color=COLOURS["direct"], linewidth=1)
    bars.set_xscale("log")
    bars.xaxis.set_major_formatter("{x:g}×")
    bars.set_xlabel("times faster than direct")
    workloads = [textwrap.fill(row["workload"], 20 if phone else 40) for row in rows]
    bars.set_yticks(range(len(rows)), workloads, fontsize=8)
    bars.set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(*bars.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=2 if phone else 4)

    for column, (loss, data) in enumerate(growth.items()):
        for line, (key, label) in enumerate((("seconds", "seconds"), ("memory", "MiB"))):
            axes = figure.add_subplot(grid[1 + line + 2 * (column // columns), column % columns])
            for name in ("direct", "torch", "jax"):
                points = [p for p in data["points"] if name in p[key]]
                size = [p[data["axis"]] for p in points]
                if key == "seconds":
                    amount = [p[key][name]["median"] for p in points]
                else:
                    amount = [max(p[key][name]["resident"], 2**14) / 2**20 for p in points]
                axes.plot(size, amount, "o-", color=COLOURS[name], label=NAMES[name])
            axes.set(xscale="log", yscale="log", ylabel=label, title=f"{loss}, by {data['axis']}" if not line else "")
            axes.minorticks_off()
            axes.set_xticks(size, [f"{x:,}" for x in size])
            if not line and not column:
                axes.legend(frameon=False, fontsize=8)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200, format="png")  # for any file name
    plt.close(figure)
