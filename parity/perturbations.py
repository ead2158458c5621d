"""How the inputs of a case are perturbed: `PERTURBATIONS` has a line for each way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.arrays import each_array
from parity.kinds import KINDS
from parity.row import Loss


def _of_kind(loss: Loss, inputs: dict[str, Any], kinds: tuple[str, ...], function: Callable) -> dict[str, Any] | None:
    """Apply a function to the inputs of some kinds, with examples on the first axis; None if there are none."""
    result = dict(inputs)
    for name in (name for name in inputs if loss.inputs[name] in kinds):
        axis = KINDS[loss.inputs[name]].axis or 0

        def change(x: np.ndarray, axis: int = axis) -> np.ndarray:
            return np.moveaxis(function(np.moveaxis(x.copy(), axis, 0)), 0, axis)

        result[name] = each_array(inputs[name], change)
    return result if set(kinds) & set(loss.inputs.values()) else None


# the kinds whose examples may contain any numbers
_NUMBERS = tuple(name for name, kind in KINDS.items() if kind.numbers and kind.axis is not None)


def _wide(scale: float, loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    return _of_kind(loss, inputs, ("logits", "kept_logits", "rest"), lambda x: x * (scale / 3))


def _confident(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The student's logit of the label is by far the largest."""
    if "labels" not in loss.inputs.values() or "logits" not in loss.inputs.values():
        return None
    labels = next(name for name, kind in loss.inputs.items() if kind == "labels")
    largest = inputs[loss.first].argmax(-1)
    return _wide(1e4, loss, {**inputs, labels: np.where(inputs[labels] < 0, inputs[labels], largest)})


def _padded(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The last class is padding in all logits, and not the label of any example."""
    if not loss.padding or inputs[loss.first].shape[-1] < 4:
        return None
    inputs = {k: x % (x.max() or 1) if loss.inputs[k] == "labels" else x for k, x in inputs.items()}

    def pad(x: np.ndarray) -> np.ndarray:
        x[..., -1] = -np.inf
        return x

    return _of_kind(loss, inputs, ("logits",), pad)


def _equal_rows(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    def repeat(x: np.ndarray) -> np.ndarray:
        x[-1] = x[0]
        return x

    return _of_kind(loss, inputs, _NUMBERS, repeat)


def _near_rows(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Two rows of the student are close, but not those of the teacher, so that their small difference matters."""
    if not loss.batch_coupled or loss.inputs[loss.first] != "features":
        return None
    student = inputs[loss.first].copy()
    student[-1] = student[0] + 1e-3 * student[-1]
    return {**inputs, loss.first: student}


def _zero_rows(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """One row of the student is 0, and another one of the teacher."""
    result = dict(inputs)
    for name, place in (*((k, 0) for k in loss.learns), *((k, -1) for k in loss.constant)):

        def zero(x: np.ndarray, axis: int = KINDS[loss.inputs[name]].axis or 0, place: int = place) -> np.ndarray:
            x = x.copy()
            np.moveaxis(x, axis, 0)[place] = 0
            return x

        result[name] = each_array(inputs[name], zero)
    return result


def _ties(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    return _of_kind(loss, inputs, _NUMBERS, np.round)


def _near_ties(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Every second class is as likely as the one before it, and in the second head more likely by a unit or two."""
    heads = [name for name in loss.learns if loss.inputs[name] == "logits"]
    if len(heads) != 2:
        return None
    result = dict(inputs)
    for name, factor in zip(heads, (1.0, 1 + 2.0**-22), strict=True):
        x = inputs[name].copy()
        x[..., 1::2] = factor * x[..., : 2 * (x.shape[-1] // 2) : 2]
        result[name] = x
    return result


def _student_is_teacher(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    if not loss.constant or not loss.learns or loss.inputs[loss.first] != loss.inputs[loss.constant[0]]:
        return None
    return {**inputs, loss.constant[0]: inputs[loss.first]}


def _equal_indices(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    def repeat(x: np.ndarray) -> np.ndarray:
        x[::2] = x[0]
        return x

    return _of_kind(loss, inputs, ("labels", "index", "negatives"), repeat)


# changes of any draw that keep its shapes; None if a change does not apply to the loss
PERTURBATIONS: dict[str, Callable[[Loss, dict[str, Any]], dict[str, Any] | None]] = {
    "logits-of-100": functools.partial(_wide, 100.0),
    "logits-of-1e4": functools.partial(_wide, 1e4),
    "confident": _confident,
    "padded": _padded,
    "padded-wide": lambda loss, inputs: (wide := _wide(150.0, loss, inputs)) and _padded(loss, wide),
    "equal-rows": _equal_rows,
    "near-rows": _near_rows,
    "zero-rows": _zero_rows,
    "ties": _ties,
    "near-ties": _near_ties,
    "student-is-teacher": _student_is_teacher,
    "equal-indices": _equal_indices,
}
