"""The scales of errors for losses that are sensitive to their inputs: the functions that a row names as its `rounding`.

An input of size M has a rounding error proportional to M. If the value is a difference of two such inputs, or the
exponential of one, its error has that size too, however small the value is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Given(NamedTuple):
    """What a scale may depend on.

    Attributes:
        largest: the largest finite number in the inputs that may contain any number.
        inputs: the inputs of the loss, by name.
        options: the settings of the loss; some may be missing.
        tiny: the smallest normal number of the inputs' precision.
        eps: the rounding of that precision.
    """

    largest: float
    inputs: dict[str, Any]
    options: dict[str, float]
    tiny: float
    eps: float


# returns the smallest numbers that the errors of (value, gradient) are measured relative to
Rounding = Callable[[Given], tuple[float, float]]


def size(x: np.ndarray) -> float:
    """The largest finite entry."""
    return float(np.abs(x[np.isfinite(x)]).max(initial=0))


def of_logits(given: Given) -> tuple[float, float]:
    """For a loss that is linear in the logits, times T² and the weights of its parts."""
    weight = max([1.0, *(given.options.get(k, 0.0) for k in ("alpha", "beta", "gamma", "mu"))])
    t = given.options.get("temperature", 1.0)
    return weight * (1 + t + given.largest) * max(1.0, t), weight * (1 + t + given.largest)


def of_entries(given: Given) -> tuple[float, float]:
    """For a loss that is linear in the entries of features, or quadratic below `beta`."""
    return given.largest, 1 + given.largest / given.options.get("beta", 1.0)


def of_squares(given: Given) -> tuple[float, float]:
    return given.largest * min(given.largest, 1e150), given.largest


def of_unit_rows(given: Given) -> tuple[float, float]:
    """For unit rows of student and centres: the gradient grows as the length of an original row decreases."""
    rows = [np.abs(given.inputs[name]).max(-1).ravel() for name in ("student", "centers") if name in given.inputs]
    lengths = [float(x) for x in np.concatenate(rows) if x >= given.tiny]
    return 1.0, 1 / min(lengths, default=1.0)


def of_spread_rows(given: Given) -> tuple[float, float]:
    """For differences of rows divided by the largest of them: the gradient grows as the largest decreases."""
    x = np.asarray(given.inputs["student"], np.longdouble)
    spread = float(np.abs(x[:, None] - x).max(initial=0))
    return 1.0, 1 / spread if spread >= given.tiny else 1.0


def of_near_rows(given: Given) -> tuple[float, float]:
    """For directions between rows, times the weights: the gradient grows as two rows get closer."""
    weight = max(1.0, *(given.options.get(k, 0.0) for k in ("distance_weight", "angle_weight")))
    x = np.asarray(given.inputs["student"], np.longdouble)
    apart = np.abs(x[:, None] - x).max(-1)
    return weight, weight / float(min(apart[apart >= given.tiny], default=1.0))


def of_variances(given: Given) -> tuple[float, float]:
    """For squares divided by a variance, which is at least log(1 + e^a) + eps for the smallest a."""
    least = float(np.logaddexp(np.min(given.inputs["log_scale"]), 0) + given.options.get("eps", 1e-5))
    with np.errstate(over="ignore"):
        ratio = np.float64(given.largest) / least
        square = ratio * given.largest
        return float(min(square, 1e300)), float(min(max(ratio, square / least), 1e300))


def of_products(given: Given) -> tuple[float, float]:
    """For squares of the products of two maps."""
    size = min(given.largest, 1e75)
    return size**4, size**3


def of_unit_maps(given: Given) -> tuple[float, float]:
    """For maps divided by their largest entry: the gradient grows as the entries of a student's map get smaller."""
    maps = given.inputs.get("student_maps") or [given.inputs["student_map"]]
    largest = np.concatenate([np.abs(x).reshape(len(x), -1).max(-1) for x in maps])
    power = max(given.options.get(k, 1.0) for k in ("p", "p1", "p2"))
    return 1.0, power / min((float(x) for x in largest if x >= given.tiny), default=1.0)


def of_unit_channels(given: Given) -> tuple[float, float]:
    """The same for maps whose channels are divided by their lengths, divided by the number of channels."""
    largest = [(float(c), x.shape[1]) for x in given.inputs["student_maps"] for c in np.abs(x).max((2, 3)).ravel()]
    return 1.0, max((1 / (c * n) for c, n in largest if c >= given.tiny), default=1.0)


def of_margins(given: Given) -> tuple[float, float]:
    """For squares of a margin minus an entry, and for the difference itself in the gradient."""
    size = given.largest + given.options.get("margin", 1.0)
    return size * min(size, 1e150), size
