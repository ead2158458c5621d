"""The one table of losses, and the cases that it makes.

A new loss is a row of `LOSSES`; every law and every comparison then tests it.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one case. Primes and odd numbers, so that no axis is taken for another."""

    batch: tuple[int, ...] = (5,)
    classes: int = 7
    dim: int = 6
    views: int = 4
    teacher_views: int = 2
    maps: tuple[tuple[int, int, int], ...] = ((3, 5, 6), (2, 3, 2))
    num_data: int = 11
    negatives: int = 4


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an input is: how it is drawn, and which of its axes counts the examples (None: none does)."""

    draw: Callable[[np.random.Generator, Sizes], Any]
    axis: int | None = 0


def _distribution(rng: np.random.Generator, n: Sizes) -> np.ndarray:
    """Mixtures of two classes; the first example is a single class."""
    number = int(np.prod(n.batch))
    labels = np.zeros((number, n.classes))
    for i in range(number):
        share = 1.0 if i == 0 else rng.uniform(0.55, 0.95)
        first, second = rng.choice(n.classes, 2, replace=False)
        labels[i, first], labels[i, second] = share, 1 - share
    return labels.reshape(*n.batch, n.classes)


def _units(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _maps(rng: np.random.Generator, n: Sizes) -> list[np.ndarray]:
    """[batch, channels, height, width]"""
    return [rng.normal(size=(*n.batch, *shape)) for shape in n.maps]


KINDS: dict[str, Kind] = {
    "logits": Kind(lambda rng, n: 3 * rng.normal(size=(*n.batch, n.classes))),
    "features": Kind(lambda rng, n: rng.normal(size=(*n.batch, n.dim))),
    "wide_features": Kind(lambda rng, n: rng.normal(size=(*n.batch, n.dim + 2))),
    "fractions": Kind(lambda rng, n: rng.uniform(size=(*n.batch, n.dim))),
    "labels": Kind(lambda rng, n: rng.integers(n.classes, size=n.batch)),
    "distribution": Kind(_distribution),
    "centers": Kind(lambda rng, n: rng.normal(size=(n.classes, n.dim)), None),
    "maps": Kind(_maps),
    "views": Kind(lambda rng, n: rng.normal(size=(n.views, *n.batch, n.dim)), 1),
    "teacher_views": Kind(lambda rng, n: rng.normal(size=(n.teacher_views, *n.batch, n.dim)), 1),
    "index": Kind(lambda rng, n: rng.choice(n.num_data, n.batch, replace=n.batch[0] > n.num_data)),
    "negatives": Kind(lambda rng, n: rng.integers(n.num_data, size=(*n.batch, n.negatives))),
    "DINOState": Kind(lambda rng, n: {"center": np.zeros(n.dim)}, None),
    "CRCDState": Kind(
        lambda rng, n: {
            "student_memory": _units(rng, n.num_data, n.dim),
            "teacher_memory": _units(rng, n.num_data, n.dim),
            "student_normalizer": np.zeros(()),
            "teacher_normalizer": np.zeros(()),
        },
        None,
    ),
}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of the table.

    Attributes:
        name: of the function, in kdjax, kdtorch and parity.oracle.
        inputs: what each of its inputs is, by name, in order.
        learns: the inputs that have a gradient.
        constant: the inputs of which the gradient must be exactly 0.
        options: settings worth a case each; the first is the ordinary one.
        leading: whether it takes any number of leading axes.
        pairs: whether an example's value depends on the others.
        shift: whether adding a number to all logits of an example changes nothing.
        divergence: whether it is 0 at student == teacher and never below.
        padding: whether a class at -inf in all logits adds nothing.
    """

    name: str
    inputs: dict[str, str]
    learns: tuple[str, ...]
    constant: tuple[str, ...] = ()
    options: tuple[dict[str, Any], ...] = ({},)
    leading: bool = True
    pairs: bool = False
    shift: bool = False
    divergence: bool = False
    padding: bool = False

    @property
    def state(self) -> str | None:
        return next((name for name, kind in self.inputs.items() if kind.endswith("State")), None)


_LOGITS = {"student_logits": "logits", "teacher_logits": "logits"}
_FEATURES = {"student": "features", "teacher": "features"}

LOSSES: tuple[Loss, ...] = (
    Loss(
        "kl_loss",
        _LOGITS,
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"temperature": 4.0}, {"temperature": 20.0}),
        shift=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "symmetric_kl_loss",
        _LOGITS,
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"temperature": 4.0}),
        shift=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "difference_kl_loss",
        _LOGITS,
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"temperature": 2.5}),
        leading=False,
        pairs=True,
        shift=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "dkd_loss",
        {**_LOGITS, "labels": "labels"},
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"alpha": 1.0, "beta": 1.0, "temperature": 1.0}, {"alpha": 0.3, "beta": 0.0, "temperature": 2.0}),
        shift=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "nkd_loss",
        {**_LOGITS, "labels": "labels"},
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"gamma": 2.0, "temperature": 2.5}),
        shift=True,
        padding=True,
    ),
    Loss(
        "nkd_loss",
        {**_LOGITS, "labels": "distribution"},
        ("student_logits",),
        ("teacher_logits",),
        shift=True,
    ),
    Loss(
        "uskd_loss",
        {"student_logits": "logits", "weak_logits": "logits", "labels": "labels"},
        ("student_logits", "weak_logits"),
        options=({}, {"alpha": 0.1, "beta": 0.5, "mu": 0.1}),
        pairs=True,
        shift=True,
        padding=True,
    ),
    Loss(
        "uskd_loss",
        {"student_logits": "logits", "weak_logits": "logits", "labels": "distribution"},
        ("student_logits", "weak_logits"),
        pairs=True,
        shift=True,
    ),
    Loss("bce_loss", {"student": "features", "teacher": "fractions"}, ("student",), ("teacher",)),
    Loss("mse_loss", _FEATURES, ("student",), ("teacher",), divergence=True),
    Loss("smooth_l1_loss", _FEATURES, ("student",), ("teacher",), ({}, {"beta": 0.3}), divergence=True),
    Loss(
        "hcl_loss",
        {"student_maps": "maps", "teacher_maps": "maps"},
        ("student_maps",),
        ("teacher_maps",),
        leading=False,
        divergence=True,
    ),
    Loss("dcn_loss", {**_FEATURES, "labels": "labels", "centers": "centers"}, ("student", "centers"), ("teacher",)),
    Loss(
        "euclidean_mse_loss",
        {"student": "features", "teacher": "wide_features"},
        ("student",),
        ("teacher",),
        leading=False,
        pairs=True,
    ),
    Loss(
        "crcd_loss",
        {**_FEATURES, "index": "index", "negatives": "negatives", "state": "CRCDState"},
        ("student", "teacher"),
        options=({}, {"temperature": 0.2, "momentum": 0.9}),
        leading=False,
        pairs=True,
    ),
    Loss(
        "dino_loss",
        {"student": "views", "teacher": "teacher_views", "state": "DINOState"},
        ("student",),
        ("teacher",),
        ({}, {"teacher_temperature": 0.07, "student_temperature": 0.3, "center_momentum": 0.5}),
        leading=False,
        shift=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss on given inputs, over one step or, where it has a state, several.

    Attributes:
        loss: the row of the table.
        name: what is particular about it.
        steps: the inputs of each step; a state is given to the first alone.
        options: settings of the loss.
        where: the mask, the same in every step.
        reduction: as the losses take it.
        scale: what an error of the gradient is measured against where the gradient itself vanishes.
        seed: of the upstream gradient; None for 1.
    """

    loss: Loss
    name: str
    steps: tuple[dict[str, Any], ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: np.ndarray | None = None
    reduction: str = "mean"
    scale: float = 0.0
    seed: int | None = 0

    def __str__(self) -> str:
        kinds = "-soft" if "distribution" in self.loss.inputs.values() else ""
        return f"{self.loss.name}{kinds}-{self.name}"


def draw(loss: Loss, sizes: Sizes, seed: int, steps: int = 1) -> tuple[dict[str, Any], ...]:
    """Random inputs for each step, in float64 but of values that float32 holds."""
    rng = np.random.default_rng([zlib.crc32(loss.name.encode()), seed])
    result = []
    for step in range(steps):
        inputs = {name: KINDS[kind].draw(rng, sizes) for name, kind in loss.inputs.items()}
        if step and loss.state:
            del inputs[loss.state]
        result.append(
            _each_array(inputs, lambda x: x.astype(np.float32).astype(np.float64) if x.dtype.kind == "f" else x)
        )
    return tuple(result)


def _each_array(x: Any, function: Callable[[np.ndarray], np.ndarray]) -> Any:
    if isinstance(x, dict):
        return {key: _each_array(value, function) for key, value in x.items()}
    if isinstance(x, list):
        return [_each_array(value, function) for value in x]
    return function(np.asarray(x))


def along(loss: Loss, inputs: dict[str, Any], function: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, Any]:
    """The inputs with a function of (array, axis of the examples) applied to those that have such an axis."""
    result = dict(inputs)
    for name in inputs:
        axis = KINDS[loss.inputs[name]].axis
        if axis is not None:
            result[name] = _each_array(inputs[name], functools.partial(_on, function, axis))
    return result


def _on(function: Callable[[np.ndarray, int], np.ndarray], axis: int, x: np.ndarray) -> np.ndarray:
    return function(x, axis)


def cases(loss: Loss, seed: int = 0) -> Iterator[Case]:
    """The cases of one row."""
    ordinary = draw(loss, Sizes(), seed, steps=3 if loss.state else 1)
    for i, options in enumerate(loss.options):
        name = "ordinary" if i == 0 else "-".join(f"{k}={v:g}" for k, v in options.items())
        yield Case(loss, name, ordinary, options, seed=seed)
    options = loss.options[0]
    yield Case(loss, "sum", ordinary, options, reduction="sum", seed=seed)
    yield Case(loss, "none", ordinary, options, reduction="none", seed=seed)

    kept = np.array([True, False, True, True, False])
    spoilt = tuple(along(loss, inputs, lambda x, axis: _spoil(x, axis, ~kept)) for inputs in ordinary)
    yield Case(loss, "masked", spoilt, options, where=kept, seed=seed)
    yield Case(loss, "masked-none", spoilt, options, where=kept, reduction="none", seed=seed)
    spoilt = tuple(along(loss, inputs, lambda x, axis: _spoil(x, axis, kept | ~kept)) for inputs in ordinary)
    yield Case(loss, "all-masked", spoilt, options, where=kept & ~kept, seed=seed)

    yield Case(loss, "one-example", draw(loss, Sizes(batch=(1,)), seed), options, seed=seed)
    yield Case(loss, "two-classes", draw(loss, Sizes(classes=2), seed), options, seed=seed)
    yield Case(loss, "larger", draw(loss, Sizes((7,), 11, 9, 3, 1, ((2, 9, 7),), 29, 5), seed), options, seed=seed)
    if loss.leading:
        leading = draw(loss, Sizes(batch=(2, 3)), seed)
        yield Case(loss, "leading-axes", leading, options, reduction="none", seed=seed)
        where = np.array([[True, False, True], [True, True, False]])
        yield Case(loss, "leading-axes-masked", leading, options, where=where, seed=seed)

    logits = [name for name, kind in loss.inputs.items() if kind == "logits"]
    for scale in (100.0, 1e4) if logits else ():
        wide = tuple({k: v * (scale / 3) if k in logits else v for k, v in x.items()} for x in ordinary)
        yield Case(loss, f"logits-of-{scale:g}", _float32(wide), options, seed=seed)
    if loss.padding:
        padded = tuple({k: _pad(v) if k in logits else v for k, v in inputs.items()} for inputs in ordinary)
        yield Case(loss, "padded", padded, options, seed=seed)
        wide = tuple({k: v * 50 if k in logits else v for k, v in inputs.items()} for inputs in padded)
        yield Case(loss, "padded-wide", _float32(wide), options, seed=seed)
    if loss.constant:
        student, teacher = loss.learns[0], loss.constant[0]
        if loss.inputs[student] == loss.inputs[teacher]:
            equal = tuple({**inputs, teacher: inputs[student]} for inputs in ordinary)
            yield Case(loss, "student-is-teacher", equal, options, scale=0.1, seed=seed)


def _float32(steps: Any) -> Any:
    return tuple(_each_array(x, lambda x: x.astype(np.float32).astype(x.dtype)) for x in steps)


def _spoil(x: np.ndarray, axis: int, masked: np.ndarray) -> np.ndarray:
    """NaN, or a number out of range, in the masked examples."""
    x = np.moveaxis(x.copy(), axis, 0)
    x[masked] = np.nan if x.dtype.kind == "f" else -100
    return np.moveaxis(x, 0, axis)


def _pad(logits: np.ndarray) -> np.ndarray:
    return np.concatenate([logits, np.full((*logits.shape[:-1], 2), -np.inf)], -1)
