"""`python -m benchmarks.hostile` counts how often the direct forms and kdtorch fail on the same hostile inputs.

Inputs are float32 where the table does not say float16. A result fails if the value or a gradient is NaN, or if it is
infinite although the formula is finite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kdtorch
from benchmarks import direct
from parity.cases import KINDS, LOSSES, Case, Loss, Sizes, draw, each_array
from parity.run import run

SIZES = Sizes(batch=(4,), classes=7, dim=5, views=3, num_data=9, negatives=3)


def _each(function: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Loss, dict[str, Any]], dict[str, Any]]:
    """Apply a function to every array of floating-point numbers; it also gets the axis of the array's examples."""

    def change(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any]:
        numbers = {k: KINDS[loss.inputs[k]].axis or 0 for k in inputs if KINDS[loss.inputs[k]].numbers}
        return inputs | {
            k: each_array(inputs[k], lambda x, axis=axis: function(x, axis)) for k, axis in numbers.items()
        }

    return change


def _first_row(x: np.ndarray, axis: int, factor: float, of: int) -> np.ndarray:
    x = np.moveaxis(x.copy(), axis, 0)
    x[0] = factor * x[of]
    return np.moveaxis(x, 0, axis)


def _equal(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any]:
    student = loss.first
    teacher = next(iter((*loss.constant, *loss.learns[1:])), student)
    return inputs | ({teacher: inputs[student]} if loss.inputs[student] == loss.inputs[teacher] else {})


def _padded(loss: Loss, inputs: dict[str, Any], number: float) -> dict[str, Any]:
    """Make the last class padding, which is not the label of any example."""
    logits = {k: inputs[k].copy() for k in inputs if loss.inputs[k] == "logits"}
    for x in logits.values():
        x[..., -1] = number
    labels = {k: np.minimum(inputs[k], 5) for k in inputs if logits and loss.inputs[k] == "labels"}
    kept = {"values": np.where(inputs["indices"] == 6, number, inputs["values"])} if "indices" in inputs else {}
    return inputs | logits | labels | kept


HOSTILE: dict[str, Callable[[Loss, dict[str, Any]], dict[str, Any]]] = {
    "ordinary, float16": lambda loss, inputs: inputs,
    "±100": _each(lambda x, axis: 100 * np.sign(x)),
    "±1e4": _each(lambda x, axis: 1e4 * np.sign(x)),
    "1e18": _each(lambda x, axis: 1e18 * x),
    "a zero row": _each(lambda x, axis: _first_row(x, axis, 0, 0)),
    "zero": _each(lambda x, axis: 0 * x),
    "subnormal": _each(lambda x, axis: 1e-44 * np.sign(x)),
    "equal rows": _each(lambda x, axis: _first_row(x, axis, 1, 1)),
    "student is teacher": _equal,
    "padded by -inf": lambda loss, inputs: _padded(loss, inputs, -np.inf),
    "padded by the lowest number": lambda loss, inputs: _padded(loss, inputs, float(np.finfo(np.float32).min)),
}


def fails(function: Callable[..., Any], loss: Loss, inputs: dict[str, Any], dtype: str) -> bool:
    """Whether the value or a gradient is not finite although the formula's is; the state is float32."""
    given = {
        k: each_array(v, lambda x, k=k: x.astype("float32" if k == loss.state else dtype) if x.dtype.kind == "f" else x)
        for k, v in inputs.items()
    }
    tensors = [_tensors(given[k]) for k in given if k != loss.state]
    free = [
        x for k, v in zip(given, tensors, strict=False) for x in (v if isinstance(v, list) else [v]) if k in loss.learns
    ]
    for x in free:
        x.requires_grad_()
    state = [getattr(kdtorch, loss.inputs[loss.state])(**_tensors(given[loss.state]))] if loss.state else []
    value = function(*tensors, *state)
    value, after = value if loss.state else (value, ())
    slopes = torch.autograd.grad(value, free, allow_unused=True)
    if value.isnan() or any(x.isnan().any() for x in slopes if x is not None):
        return True
    if not all(x.isfinite().all() for x in after):
        return True
    infinite = any(x.isinf().any() for x in slopes if x is not None)
    if not (value.isinf() or infinite):
        return False
    largest = np.finfo(np.float32).max
    with np.errstate(all="ignore"):
        exact = run("oracle", Case(loss, "", (inputs,), seed=None), dtype, gradients=infinite)
    if value.isinf() and np.abs(exact.values[0]) < largest:
        return True
    if not infinite:
        return False
    slope = exact.gradients[0]
    right = [x for k in loss.learns for x in (slope[k] if isinstance(slope[k], list) else [slope[k]])]
    pairs = zip(slopes, right, strict=True)
    return any(bool((x.isinf().numpy() & (np.abs(y) < largest)).any()) for x, y in pairs if x is not None)


def _tensors(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _tensors(v) for k, v in x.items()}
    return (
        [torch.from_numpy(np.ascontiguousarray(y)) for y in x] if isinstance(x, list) else torch.from_numpy(np.array(x))
    )


def count(draws: int) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """For each loss that has a direct form and each kind of input: how often the direct form fails, and kdtorch."""
    rows = []
    chosen = [x for x in LOSSES if x.learns and hasattr(direct, x.name) and x.title == x.name]
    for loss in track(chosen, "losses", console=Console(stderr=True)):
        counts = {}
        for kind, change in HOSTILE.items():
            drawn = [change(loss, draw(loss, SIZES, seed)[0]) for seed in range(draws)]
            with np.errstate(all="ignore"):
                dtype = "float16" if "float16" in kind else "float32"
                pair = [sum(fails(loss.of(x), loss, y, dtype) for y in drawn) for x in (direct, kdtorch)]
            counts[kind] = (pair[0], pair[1])
        rows.append((loss.name, counts))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--draws", type=int, default=20, help="draws per kind and loss")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = count(options.draws)
    table = Table("loss", *HOSTILE, "all", title=f"failures in {options.draws} draws: direct form / kdtorch")
    for name, counts in rows:
        total = [sum(pair[i] for pair in counts.values()) for i in (0, 1)]
        table.add_row(name, *(f"{a} / {b}" for a, b in counts.values()), f"{total[0]} / {total[1]}")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return any(pair[1] for _, counts in rows for pair in counts.values())


if __name__ == "__main__":
    sys.exit(main())
