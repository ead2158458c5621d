"""Draws the picture of a run: ratios as bars, and how time and memory grow."""

from __future__ import annotations

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


def draw(result: dict[str, Any], path: str) -> None:
    growth = result["growth"]
    figure = plt.figure(figsize=(12, 6 + 3.2 * bool(growth) * 2), layout="constrained")
    grid = figure.add_gridspec(1 + 2 * bool(growth), max(len(growth), 1), height_ratios=[2] + [1, 1] * bool(growth))

    bars = figure.add_subplot(grid[0, :])
    rows = [row for row in result["workloads"] if "direct" in row["seconds"]]
    names = [name for name in NAMES if name != "direct"]
    for i, name in enumerate(names):
        ratios = [
            row["seconds"]["direct"]["median"] / row["seconds"][name]["median"] if name in row["seconds"] else 0
            for row in rows
        ]
        places = [x + 0.2 * (i - (len(names) - 1) / 2) for x in range(len(rows))]
        bars.bar(places, ratios, 0.18, color=COLOURS[name], label=NAMES[name])
    bars.axhline(1, color=COLOURS["direct"], linewidth=1)
    bars.set_yscale("log")
    bars.set_ylabel("times faster than direct")
    bars.set_xticks(range(len(rows)), [row["workload"] for row in rows], rotation=55, ha="right", fontsize=8)
    bars.legend(frameon=False)

    for column, (loss, data) in enumerate(growth.items()):
        for line, (key, label) in enumerate((("seconds", "seconds"), ("memory", "MiB"))):
            axes = figure.add_subplot(grid[1 + line, column])
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
    figure.savefig(path, dpi=130, format="png")  # for any file name
    plt.close(figure)
