"""The one table of losses, and the cases that it makes.

A new loss is a row of `LOSSES`; every law and every comparison then tests it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
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


def _permutations(rng: np.random.Generator, n: Sizes) -> np.ndarray:
    """The classes of each example in an order of its own."""
    return rng.random((*n.batch, n.classes)).argsort(-1)


def _kept(n: Sizes) -> int:
    return max(1, n.classes // 2)


KINDS: dict[str, Kind] = {
    "logits": Kind(lambda rng, n: 3 * rng.normal(size=(*n.batch, n.classes))),
    "kept_logits": Kind(lambda rng, n: 3 * rng.normal(size=(*n.batch, _kept(n)))),
    "kept_classes": Kind(lambda rng, n: _permutations(rng, n)[..., : _kept(n)]),
    "rest": Kind(lambda rng, n: 3 * rng.normal(size=n.batch)),
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
        ranges: from where to where random draws take each setting.
        scale: of the terms that the value is the difference of: the least number to measure its error by.
        leading: whether it takes any number of leading axes.
        batch_coupled: whether an example's value depends on the others.
        shift_invariant: whether adding a number to all logits of an example changes nothing.
        divergence: whether it is 0 at student == teacher and never below.
        padding: whether a class at -inf in all logits adds nothing.
    """

    name: str
    inputs: dict[str, str]
    learns: tuple[str, ...]
    constant: tuple[str, ...] = ()
    options: tuple[dict[str, Any], ...] = ({},)
    ranges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    scale: float = 0.0
    leading: bool = True
    batch_coupled: bool = False
    shift_invariant: bool = False
    divergence: bool = False
    padding: bool = False

    @property
    def title(self) -> str:
        """The name, and what tells two rows of one name apart."""
        return self.name + ("-soft" if "distribution" in self.inputs.values() else "")

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
        {"temperature": (0.5, 20.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "symmetric_kl_loss",
        _LOGITS,
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"temperature": 4.0}),
        {"temperature": (0.5, 20.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "difference_kl_loss",
        _LOGITS,
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"temperature": 2.5}),
        {"temperature": (0.5, 20.0)},
        leading=False,
        batch_coupled=True,
        shift_invariant=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "dkd_loss",
        {**_LOGITS, "labels": "labels"},
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"alpha": 1.0, "beta": 1.0, "temperature": 1.0}, {"alpha": 0.3, "beta": 0.0, "temperature": 2.0}),
        {"alpha": (0.0, 2.0), "beta": (0.0, 10.0), "temperature": (0.5, 20.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
    ),
    Loss(
        "nkd_loss",
        {**_LOGITS, "labels": "labels"},
        ("student_logits",),
        ("teacher_logits",),
        ({}, {"gamma": 2.0, "temperature": 2.5}),
        {"gamma": (0.0, 3.0), "temperature": (0.5, 10.0)},
        shift_invariant=True,
        padding=True,
    ),
    Loss(
        "nkd_loss",
        {**_LOGITS, "labels": "distribution"},
        ("student_logits",),
        ("teacher_logits",),
        ranges={"gamma": (0.0, 3.0), "temperature": (0.5, 10.0)},
        shift_invariant=True,
    ),
    Loss(
        "uskd_loss",
        {"student_logits": "logits", "weak_logits": "logits", "labels": "labels"},
        ("student_logits", "weak_logits"),
        options=({}, {"alpha": 0.1, "beta": 0.5, "mu": 0.1}),
        ranges={"alpha": (0.0, 2.0), "beta": (0.0, 1.0), "mu": (0.0, 0.1)},
        batch_coupled=True,
        shift_invariant=True,
        padding=True,
    ),
    Loss(
        "uskd_loss",
        {"student_logits": "logits", "weak_logits": "logits", "labels": "distribution"},
        ("student_logits", "weak_logits"),
        ranges={"alpha": (0.0, 2.0), "beta": (0.0, 1.0), "mu": (0.0, 0.1)},
        batch_coupled=True,
        shift_invariant=True,
    ),
    Loss(
        "topk_kl_loss",
        {"student_logits": "logits", "values": "kept_logits", "indices": "kept_classes", "rest": "rest"},
        ("student_logits",),
        ("values", "rest"),
        ({}, {"temperature": 4.0}, {"temperature": 2.0, "tail": "renormalize"}),
        {"temperature": (0.5, 20.0)},
        shift_invariant=True,
    ),
    Loss("bce_loss", {"student": "features", "teacher": "fractions"}, ("student",), ("teacher",)),
    Loss("mse_loss", _FEATURES, ("student",), ("teacher",), divergence=True),
    Loss(
        "smooth_l1_loss",
        _FEATURES,
        ("student",),
        ("teacher",),
        ({}, {"beta": 0.3}),
        {"beta": (0.1, 3.0)},
        divergence=True,
    ),
    Loss(
        "hcl_loss",
        {"student_maps": "maps", "teacher_maps": "maps"},
        ("student_maps",),
        ("teacher_maps",),
        leading=False,
        divergence=True,
    ),
    Loss(
        "dcn_loss",
        {**_FEATURES, "labels": "labels", "centers": "centers"},
        ("student", "centers"),
        ("teacher",),
        scale=1.0,  # one less a cosine
    ),
    Loss(
        "euclidean_mse_loss",
        {"student": "features", "teacher": "wide_features"},
        ("student",),
        ("teacher",),
        scale=0.1,  # the square of a difference of distances, which nearly agree where the batch is small
        leading=False,
        batch_coupled=True,
    ),
    Loss(
        "crcd_loss",
        {**_FEATURES, "index": "index", "negatives": "negatives", "state": "CRCDState"},
        ("student", "teacher"),
        options=({}, {"temperature": 0.2, "momentum": 0.9}),
        ranges={"temperature": (0.05, 1.0), "momentum": (0.0, 0.99)},
        leading=False,
        batch_coupled=True,
    ),
    Loss(
        "dino_loss",
        {"student": "views", "teacher": "teacher_views", "state": "DINOState"},
        ("student",),
        ("teacher",),
        ({}, {"teacher_temperature": 0.07, "student_temperature": 0.3, "center_momentum": 0.5}),
        {"teacher_temperature": (0.04, 0.1), "student_temperature": (0.05, 0.5), "center_momentum": (0.0, 0.99)},
        leading=False,
        shift_invariant=True,
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
        where: the mask of every step, or None.
        reduction: of the loss.
        scale: the least number to measure the error of the gradient by, where it is small or 0 in exact arithmetic.
        value_scale: the same of the value.
        seed: of the gradient from above; None for 1.
        bounds: where the formula itself is ill-conditioned, the limits of (value, gradient, state) held instead.
        why: the formula is ill-conditioned there.
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


def draw(loss: Loss, sizes: Sizes, seed: int, steps: int = 1) -> tuple[dict[str, Any], ...]:
    """Random inputs for each step, in float64 but of values that float32 holds."""
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


def each_array(x: Any, function: Callable[[np.ndarray], np.ndarray]) -> Any:
    if isinstance(x, dict):
        return {key: each_array(value, function) for key, value in x.items()}
    if isinstance(x, list):
        return [each_array(value, function) for value in x]
    return function(np.asarray(x))


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


def _of_kind(loss: Loss, inputs: dict[str, Any], kinds: tuple[str, ...], function: Callable) -> dict[str, Any] | None:
    """The inputs with a function of (array, with its examples first) applied to those of some kinds, if there are any."""
    result = dict(inputs)
    for name in (name for name in inputs if loss.inputs[name] in kinds):
        axis = KINDS[loss.inputs[name]].axis or 0

        def change(x: np.ndarray, axis: int = axis) -> np.ndarray:
            return np.moveaxis(function(np.moveaxis(x.copy(), axis, 0)), 0, axis)

        result[name] = each_array(inputs[name], change)
    return result if set(kinds) & set(loss.inputs.values()) else None


_NUMBERS = ("logits", "kept_logits", "rest", "features", "wide_features", "maps", "views", "teacher_views")


def _wide(scale: float, loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    return _of_kind(loss, inputs, ("logits", "kept_logits", "rest"), lambda x: x * (scale / 3))


def _confident(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The student's largest logit is that of the label, by far."""
    if "labels" not in loss.inputs.values() or "logits" not in loss.inputs.values():
        return None
    labels = next(name for name, kind in loss.inputs.items() if kind == "labels")
    largest = inputs[loss.learns[0]].argmax(-1)
    return _wide(1e4, loss, {**inputs, labels: np.where(inputs[labels] < 0, inputs[labels], largest)})


def _padded(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The last class is padding, in all logits, and nobody's label."""
    if not loss.padding or inputs[loss.learns[0]].shape[-1] < 4:
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
    """Two of the student's; the teacher's stay apart, so that what separates the two is felt."""
    if not loss.batch_coupled or loss.inputs[loss.learns[0]] != "features":
        return None
    student = inputs[loss.learns[0]].copy()
    student[-1] = student[0] + 1e-3 * student[-1]
    return {**inputs, loss.learns[0]: student}


def _zero_rows(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """One of the student's, and another of the teacher's."""
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
    """Every second class is as likely as the one before to the student, and by a unit or two more to the weak head."""
    if loss.name != "uskd_loss":
        return None
    result = dict(inputs)
    for name, factor in (("student_logits", 1.0), ("weak_logits", 1 + 2.0**-22)):
        x = inputs[name].copy()
        x[..., 1::2] = factor * x[..., : 2 * (x.shape[-1] // 2) : 2]
        result[name] = x
    return result


def _student_is_teacher(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    if not loss.constant or loss.inputs[loss.learns[0]] != loss.inputs[loss.constant[0]]:
        return None
    return {**inputs, loss.constant[0]: inputs[loss.learns[0]]}


def _equal_indices(loss: Loss, inputs: dict[str, Any]) -> dict[str, Any] | None:
    def repeat(x: np.ndarray) -> np.ndarray:
        x[::2] = x[0]
        return x

    return _of_kind(loss, inputs, ("labels", "index", "negatives"), repeat)


# what can be done to any draw, without a change of its shapes: None where it means nothing for the loss
TWISTS: dict[str, Callable[[Loss, dict[str, Any]], dict[str, Any] | None]] = {
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


# of a twist that makes a formula ill-conditioned: the limits held instead, and why
_ILL: dict[str, tuple[dict[str, tuple[float, float, float]], str]] = {
    "near-rows": (
        {"float64": (64, 512, 64), "float32": (16, 512, 64)},
        "the rows are rounded once they have unit length, and two of them differ by a thousandth of that",
    ),
    "near-ties": (
        {"float32": (2**13, 2**19, 0)},
        "classes whose scores are a few units in the last place apart change places with the rounding of the softmax",
    ),
}


def twist(case: Case, name: str) -> Case | None:
    """The case with all its steps twisted, if the twist means anything for its loss."""
    twisted = [TWISTS[name](case.loss, inputs) for inputs in case.steps]
    steps = tuple(_float32(inputs) for inputs in twisted if inputs is not None)
    if len(steps) < len(twisted):
        return None
    scale = 0.1 * math.prod(max(1.0, x) for x in case.options.values()) if name == "student-is-teacher" else case.scale
    full_name = name if case.name == "ordinary" else f"{case.name}-{name}"
    bounds, why = _ILL.get(name, ({}, ""))
    return dataclasses.replace(case, name=full_name, steps=steps, scale=scale, bounds=bounds, why=why)


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

    yield Case(loss, "one-example", draw(loss, Sizes(batch=(1,)), seed), loss.options[0], seed=seed)
    if {"logits", "labels"} & set(loss.inputs.values()):
        yield Case(loss, "two-classes", draw(loss, Sizes(classes=2), seed), loss.options[0], seed=seed)
    prime = Sizes((7,), 13, 11, 3, 1, ((2, 11, 7),), 29, 5)
    yield Case(loss, "prime-sizes", draw(loss, prime, seed), loss.options[0], seed=seed)
    if loss.leading:
        leading = Case(loss, "leading-axes", draw(loss, Sizes(batch=(2, 3)), seed), loss.options[0], seed=seed)
        where = np.array([[True, False, True], [True, True, False]])
        yield dataclasses.replace(leading, where=where, reduction="none")

    for name in TWISTS:
        twisted = twist(ordinary, name)
        if twisted is not None:
            yield twisted


def random_case(loss: Loss, seed: int) -> Case:
    """A case of random sizes, settings, mask, reduction and twist."""
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
    options = {name: float(np.float32(rng.uniform(*ends))) for name, ends in loss.ranges.items()}
    steps = draw(loss, sizes, seed, steps=int(rng.integers(1, 5)) if loss.state else 1)
    reduction = str(rng.choice(["mean", "sum", "none"]))
    case = Case(loss, f"draw-{seed}", steps, options, reduction=reduction, seed=seed)
    name = str(rng.choice([name for name in TWISTS if not name.startswith("near")]))
    case = twist(case, name) or case
    # the oracle's own rounding, where all is 0; and that of logits so large that what is left of one another is little
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
