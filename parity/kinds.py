"""How the inputs of losses are drawn: `KINDS` has a line for each kind of input, and `Sizes` has their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one case. Most of them differ, so that no axis is confused with another.

    Attributes:
        batch: the axes of the examples; one axis, unless the loss takes any number of leading axes.
        classes: the number of classes of logits, labels, distributions and centres.
        dim: the width of features, centres, memories and views.
        views: the number of views of the student.
        teacher_views: the number of views of the teacher.
        maps: channels, height and width of each feature map.
        num_data: the number of samples in the whole data set, for losses that remember each of them.
        negatives: the number of negatives per example.
        kept: the number of a teacher's classes that were recorded; None for half of them.
        teacher_dim: the width of the teacher's features if it may differ from the student's; None for `dim + 2`.
        positions: the length of a sequence.
        patches: the number of patches of an image.
    """

    batch: tuple[int, ...] = (5,)
    classes: int = 7
    dim: int = 6
    views: int = 4
    teacher_views: int = 2
    maps: tuple[tuple[int, int, int], ...] = ((3, 5, 6), (2, 3, 2))
    num_data: int = 11
    negatives: int = 4
    kept: int | None = None
    teacher_dim: int | None = None
    positions: int = 4
    patches: int = 3


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        draw: draws it at random. A state is a dictionary of its fields, maps are a list of arrays.
        axis: the axis of the examples; None if there is none.
        axes: the number of axes of an example.
        masked: how many of these axes a mask also has, in addition to the axis of the examples.
        numbers: whether it may contain any real numbers, so that tests can use extreme ones.
        fit: converts any numbers to numbers that it may contain.
        later: the fields of a state that are 0 before the first step, with a value that each may have afterwards.
    """

    draw: Callable[[np.random.Generator, Sizes], Any]
    axis: int | None = 0
    axes: int = 1
    masked: int = 0
    numbers: bool = False
    fit: Callable[[np.ndarray], np.ndarray] | None = None
    later: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _moderate(x: np.ndarray) -> np.ndarray:
    """Numbers whose products do not overflow in float32."""
    return np.clip(x, -1e4, 1e4)


def _at_most_zero(x: np.ndarray) -> np.ndarray:
    return -np.abs(x)


def _distribution(rng: np.random.Generator, n: Sizes) -> np.ndarray:
    """Distributions over two classes; that of the first example is a single class."""
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


def _neighbours(rng: np.random.Generator, n: Sizes) -> list[np.ndarray]:
    """The same with at least two maps."""
    channels, height, width = n.maps[-1]
    deeper = (channels + 1, (height + 1) // 2, (width + 1) // 2)
    return _maps(rng, dataclasses.replace(n, maps=n.maps if len(n.maps) > 1 else (*n.maps, deeper)))


def _permutations(rng: np.random.Generator, n: Sizes) -> np.ndarray:
    """A random permutation of the classes for each example."""
    return rng.random((*n.batch, n.classes)).argsort(-1)


def _sequences(rng: np.random.Generator, n: Sizes, dim: int) -> np.ndarray:
    """[batch, positions, features], with the features of two heads side by side."""
    return rng.normal(size=(*n.batch, n.positions, 2 * dim))


def _patch_mask(rng: np.random.Generator, n: Sizes) -> np.ndarray:
    """Which patches of an image are masked: the first and some others, but none in every third image."""
    mask = rng.random((*n.batch, n.patches)) < 0.5
    mask[..., 0] = True
    mask[2::3] = False
    return mask


def _kept(n: Sizes) -> int:
    return n.kept or max(1, n.classes // 2)


def _crcd_state(rng: np.random.Generator, n: Sizes) -> dict[str, np.ndarray]:
    return {
        "student_memory": _units(rng, n.num_data, n.dim),
        "teacher_memory": _units(rng, n.num_data, n.dim),
        "student_normalizer": np.zeros(()),
        "teacher_normalizer": np.zeros(()),
    }


def _crd_state(rng: np.random.Generator, n: Sizes) -> dict[str, np.ndarray]:
    """The state before the first step, whose rows are not unit rows."""
    ends = np.sqrt(3 / n.dim)
    memories = {f"{side}_memory": rng.uniform(-ends, ends, (n.num_data, n.dim)) for side in ("student", "teacher")}
    return {**memories, "student_normalizer": np.zeros(()), "teacher_normalizer": np.zeros(())}


KINDS: dict[str, Kind] = {
    "logits": Kind(lambda rng, n: 3 * rng.normal(size=(*n.batch, n.classes)), numbers=True),
    "kept_logits": Kind(lambda rng, n: 3 * rng.normal(size=(*n.batch, _kept(n))), numbers=True),
    "kept_classes": Kind(lambda rng, n: _permutations(rng, n)[..., : _kept(n)]),
    "log_probs": Kind(lambda rng, n: _at_most_zero(3 * rng.normal(size=n.batch)), axes=0, fit=_at_most_zero),
    "rest": Kind(lambda rng, n: 3 * rng.normal(size=n.batch), axes=0, numbers=True),
    "features": Kind(lambda rng, n: rng.normal(size=(*n.batch, n.dim)), numbers=True),
    "wide_features": Kind(lambda rng, n: rng.normal(size=(*n.batch, n.teacher_dim or n.dim + 2)), numbers=True),
    "sequences": Kind(lambda rng, n: _sequences(rng, n, n.dim), axes=2, masked=1, numbers=True),
    "wide_sequences": Kind(
        lambda rng, n: _sequences(rng, n, n.teacher_dim or n.dim + 2), axes=2, masked=1, numbers=True
    ),
    "fractions": Kind(lambda rng, n: rng.uniform(size=(*n.batch, n.dim)), fit=lambda x: np.clip(x, 0, 1)),
    "labels": Kind(lambda rng, n: rng.integers(n.classes, size=n.batch), axes=0),
    "distribution": Kind(_distribution),
    "centers": Kind(lambda rng, n: rng.normal(size=(n.classes, n.dim)), None, numbers=True),
    "hidden": Kind(lambda rng, n: rng.normal(size=(*n.batch, n.dim)), numbers=True, fit=_moderate),
    "wide_hidden": Kind(
        lambda rng, n: rng.normal(size=(*n.batch, n.teacher_dim or n.dim + 2)), numbers=True, fit=_moderate
    ),
    "head": Kind(lambda rng, n: rng.normal(size=(n.classes, n.dim)), None, numbers=True, fit=_moderate),
    "wide_head": Kind(
        lambda rng, n: rng.normal(size=(n.classes, n.teacher_dim or n.dim + 2)), None, numbers=True, fit=_moderate
    ),
    "bias": Kind(lambda rng, n: rng.normal(size=n.classes), None, numbers=True, fit=_moderate),
    "maps": Kind(_maps, numbers=True),
    "neighbours": Kind(_neighbours, numbers=True),
    "channels": Kind(lambda rng, n: rng.normal(size=n.maps[0][0]), None, numbers=True),  # one number per channel
    "map": Kind(lambda rng, n: _maps(rng, n)[0], numbers=True),
    "views": Kind(lambda rng, n: rng.normal(size=(n.views, *n.batch, n.dim)), 1, numbers=True),
    "teacher_views": Kind(lambda rng, n: rng.normal(size=(n.teacher_views, *n.batch, n.dim)), 1, numbers=True),
    "patches": Kind(lambda rng, n: rng.normal(size=(*n.batch, n.patches, n.dim)), axes=2, numbers=True),
    "wide_patches": Kind(
        lambda rng, n: rng.normal(size=(*n.batch, n.patches, n.teacher_dim or n.dim + 2)), axes=2, numbers=True
    ),
    "patch_mask": Kind(_patch_mask, axes=1),
    "index": Kind(lambda rng, n: rng.choice(n.num_data, n.batch, replace=n.batch[0] > n.num_data)),
    "negatives": Kind(lambda rng, n: rng.integers(n.num_data, size=(*n.batch, n.negatives))),
    "IBOTState": Kind(lambda rng, n: {"center": np.zeros(n.dim)}, None),
    "DINOState": Kind(lambda rng, n: {"center": np.zeros(n.dim)}, None),
    "CRDState": Kind(_crd_state, None, later={"student_normalizer": 9.0, "teacher_normalizer": 2.0}),
    "CRCDState": Kind(_crcd_state, None, later={"student_normalizer": 9.0, "teacher_normalizer": 2.0}),
}

MAPS = frozenset({"maps", "neighbours", "map"})  # their channels are first in NumPy and kdtorch, and last in kdjax
