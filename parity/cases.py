"""The test cases that follow from the table of losses.

A new loss is a file in `parity/losses`; all properties and comparisons are then tested for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity.arrays import each_array
from parity.calls import masked_axes
from parity.kinds import KINDS, MAPS, Sizes
from parity.losses import LOSSES
from parity.perturbations import PERTURBATIONS
from parity.row import Loss

__all__ = [
    "KINDS",
    "LOSSES",
    "MAPS",
    "PERTURBATIONS",
    "Case",
    "Loss",
    "Sizes",
    "along",
    "cases",
    "draw",
    "each_array",
    "perturbed",
    "random_case",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss on given inputs, over one step or, if it has a state, several.

    Attributes:
        loss: the row of the table.
        name: what is special about the case.
        steps: the inputs of each step; only the first has a state.
        options: settings of the loss.
        where: the mask of every step, or None.
        reduction: the reduction of the loss.
        scale: the smallest number that the error of the gradient is measured relative to, for a gradient that is small
            or 0 in exact arithmetic.
        value_scale: the same for the value.
        seed: the seed of the upstream gradient; None for 1.
        bounds: wider limits of (value, gradient, state) if the formula itself is ill-conditioned.
        why: the reason why the formula is ill-conditioned there.
    """

    loss: Loss
    name: str
    steps: tuple[dict[str, Any], ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: np.ndarray | None = None
    reduction: str = "mean"
    scale: float = 0.0
    value_scale: float = 0.0
    seed: int | None = 0
    bounds: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        return f"{self.loss.title}-{self.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """The options, and the settings without a default."""
        return {**self.loss.required, **self.options}


def draw(loss: Loss, sizes: Sizes, seed: int, steps: int = 1) -> tuple[dict[str, Any], ...]:
    """Random inputs for each step, in float64, but with values that float32 can represent."""
    rng = np.random.default_rng([zlib.crc32(loss.name.encode()), seed])
    result = []
    for step in range(steps):
        inputs = {name: KINDS[kind].draw(rng, sizes) for name, kind in loss.inputs.items()}
        if step and loss.state:
            del inputs[loss.state]
        result.append(_float32(inputs))
    return tuple(result)


def _float32(inputs: dict[str, Any]) -> dict[str, Any]:
    return each_array(inputs, lambda x: x.astype(np.float32).astype(np.float64) if x.dtype.kind == "f" else x)


def along(loss: Loss, inputs: dict[str, Any], function: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, Any]:
    """The inputs with a function of (array, axis of the examples) applied to those that have such an axis."""
    result = dict(inputs)
    for name in inputs:
        axis = KINDS[loss.inputs[name]].axis
        if axis is not None:
            result[name] = each_array(inputs[name], functools.partial(_on, function, axis))
    return result


def _on(function: Callable[[np.ndarray, int], np.ndarray], axis: int, x: np.ndarray) -> np.ndarray:
    return function(x, axis)


def perturbed(case: Case, name: str) -> Case | None:
    """The case with all its steps perturbed in one way, or None if that does not apply to the loss."""
    changed = [PERTURBATIONS[name](case.loss, inputs) for inputs in case.steps]
    steps = tuple(_float32(inputs) for inputs in changed if inputs is not None)
    if len(steps) < len(changed):
        return None
    numbers = [x for x in case.options.values() if not isinstance(x, str)]
    scale = 0.1 * math.prod(max(1.0, x) for x in numbers) if name == "student-is-teacher" else case.scale
    full_name = name if case.name == "ordinary" else f"{case.name}-{name}"
    return _bounded(dataclasses.replace(case, name=full_name, steps=steps, scale=scale), name)


def _bounded(case: Case, name: str) -> Case:
    """The case with the wider limits that its row has for a case of this name."""
    ill = case.loss.ill_conditioned.get(name)
    if ill is None:
        return case
    return dataclasses.replace(case, bounds=ill.bounds, why=ill.why, scale=max(case.scale, ill.scale))


def cases(loss: Loss, seed: int = 0) -> Iterator[Case]:
    """The cases of one row."""
    steps = draw(loss, Sizes(), seed, steps=3 if loss.state else 1)
    ordinary = Case(loss, "ordinary", steps, loss.options[0], seed=seed)
    yield ordinary
    for options in loss.options[1:]:
        name = "-".join(f"{k}={v}" if isinstance(v, str) else f"{k}={v:g}" for k, v in options.items())
        yield dataclasses.replace(ordinary, name=name, options=options)
    yield dataclasses.replace(ordinary, name="none", reduction="none")

    some = np.array([True, False, True, True, False])
    for name, kept, reduction in (
        ("masked", some, "mean"),
        ("masked-sum", some, "sum"),
        ("none-masked", some | True, "mean"),
        ("all-masked", some & False, "mean"),
    ):
        yield dataclasses.replace(ordinary, name=name, steps=_spoilt(ordinary, kept), where=kept, reduction=reduction)

    if masked_axes(loss):
        parts = np.random.default_rng(seed).random((5, Sizes().positions)) < 0.6
        parts[2], parts[3] = False, np.arange(Sizes().positions) == 1  # an example without parts, and one with one
        for name, reduction in (("masked-parts", "mean"), ("none-masked-parts", "none")):
            steps = _spoilt(ordinary, parts)
            yield dataclasses.replace(ordinary, name=name, steps=steps, where=parts, reduction=reduction)

    yield Case(loss, "one-example", draw(loss, Sizes(batch=(1,)), seed), loss.options[0], seed=seed)
    if {"logits", "labels"} & set(loss.inputs.values()):
        two = Case(loss, "two-classes", draw(loss, Sizes(classes=2), seed), loss.options[0], seed=seed)
        yield _bounded(two, "two-classes")
    prime = Sizes((7,), 13, 11, 3, 1, ((2, 11, 7),), 29, 5)
    yield Case(loss, "prime-sizes", draw(loss, prime, seed), loss.options[0], seed=seed)
    if loss.other_maps:
        (student,), (teacher,) = (draw(loss, Sizes(maps=maps), seed) for maps in (Sizes().maps, loss.other_maps))
        apart = {k: v if k in loss.learns else teacher[k] for k, v in student.items()}
        yield Case(loss, "other-sizes", (apart,), loss.options[0], seed=seed)
    if loss.leading:
        leading = Case(loss, "leading-axes", draw(loss, Sizes(batch=(2, 3)), seed), loss.options[0], seed=seed)
        where = np.array([[True, False, True], [True, True, False]])
        yield dataclasses.replace(leading, where=where, reduction="none")

    for name in PERTURBATIONS:
        case = perturbed(ordinary, name)
        if case is not None:
            yield case


def random_case(loss: Loss, seed: int) -> Case:
    """A case of random sizes, settings, mask, reduction and perturbation."""
    rng = np.random.default_rng([zlib.crc32(loss.title.encode()), seed, 1])
    batch: tuple[int, ...] = (int(rng.integers(1, 8)),)
    if loss.leading and rng.random() < 0.3:
        batch = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    views = int(rng.integers(2, 6))
    sizes = Sizes(
        batch,
        int(rng.integers(2, 18)),
        int(rng.integers(1, 14)),
        views,
        int(rng.integers(1, min(views, 3) + 1)),
        tuple(tuple(int(n) for n in rng.integers(1, (3, 8, 8))) for _ in range(rng.integers(1, 3))),  # type: ignore[misc]
        int(rng.integers(7, 40)),
        int(rng.integers(1, 8)),
    )
    if loss.first_of_ties:  # in one dimension all unit rows are equal or opposite
        sizes = dataclasses.replace(sizes, dim=max(sizes.dim, 2))
    options = {name: float(np.float32(rng.uniform(*ends))) for name, ends in loss.ranges.items()}
    if loss.forms:
        place = int(rng.integers(min(map(len, loss.forms.values()))))
        options |= {name: values[place] for name, values in loss.forms.items()}
    steps = draw(loss, sizes, seed, steps=int(rng.integers(1, 5)) if loss.state else 1)
    reduction = str(rng.choice(["mean", "sum", "none"]))
    case = Case(loss, f"draw-{seed}", steps, options, reduction=reduction, seed=seed)
    name = str(rng.choice([name for name in PERTURBATIONS if not name.startswith("near")]))
    case = perturbed(case, name) or case
    # scales for the oracle's own rounding where the exact result is 0, and for large logits, whose differences are
    # small
    case = _bounded(case, "two-classes") if sizes.classes == 2 else case
    felt = {"logits-of-100": 1.0, "padded-wide": 1.0, "logits-of-1e4": 16.0, "confident": 16.0}.get(name, 0.0)
    case = dataclasses.replace(case, scale=max(case.scale, felt, 2.0**-14), value_scale=felt)
    if rng.random() < 0.4:
        kept = rng.random(batch) < 0.7
        case = dataclasses.replace(case, name=f"{case.name}-masked", steps=_spoilt(case, kept), where=kept)
    return case


def _spoilt(case: Case, kept: np.ndarray) -> tuple[dict[str, Any], ...]:
    """The steps with NaN, or a number out of range, in the examples that are not kept."""

    def spoil(x: np.ndarray, axis: int) -> np.ndarray:
        x = np.moveaxis(x.copy(), axis, 0)
        x[~kept] = np.nan if x.dtype.kind == "f" else -100
        return np.moveaxis(x, 0, axis)

    return tuple(along(case.loss, inputs, spoil) for inputs in case.steps)
