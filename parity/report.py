"""Writes a comparison to a file: JSON, or a page to open in a browser."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

import jinja2

from parity.compare import Comparison, Difference

_PACKAGES = ("kdlosses", "jax", "jaxlib", "flax", "torch", "numpy")


def environment() -> dict[str, str]:
    """The date, the versions and the machine."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def check_writable(path: str | None) -> None:
    """Raise now the `OSError` that writing would raise later."""
    if path is not None:
        with open(path, "a"):
            pass


def write_json(path: str, comparison: Comparison) -> None:
    """Write all differences; NaN and infinities, which JSON does not have, are strings."""
    content = {
        "environment": environment(),
        "passed": comparison.passed,
        "differences": [_finite(dataclasses.asdict(x)) for x in comparison.differences],
    }
    pathlib.Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _finite(x: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in x.items()}


def write_html(path: str, comparison: Comparison) -> None:
    """Write one page that needs no other file: verdict, heat map, sortable table, failures, and versions."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("parity", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"shade": _shade, "sortable": lambda x: 1e308 if math.isinf(x) else x}
    rows = list(comparison.rows())
    heat: dict[str, dict[str, Difference]] = {}
    for subject, dtype, cells in rows:
        heat.setdefault(subject, {})[dtype] = max(cells.values(), key=lambda x: x.ulp)
    page = templates.get_template("report.html").render(
        comparison=comparison,
        rows=rows,
        columns=comparison.columns(),
        heat=heat,
        dtypes=list(dict.fromkeys(dtype for _, dtype, _ in rows)),
        environment=environment(),
    )
    pathlib.Path(path).write_text(page)


def _shade(ulp: float) -> str:
    """A colour for log2 of the error: green at a unit or less, red at 256 and above."""
    level = 1.0 if math.isinf(ulp) else min(math.log2(max(ulp, 1.0)) / 8, 1.0)
    return f"hsl({130 - 130 * level:.0f} 65% 45%)"
