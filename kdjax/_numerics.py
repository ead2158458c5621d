"""Numerically careful functions that several losses share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim

from kdjax._collectives import class_devices, class_max, class_sum, rank
from kdjax._typing import AxisName, Scalar

HIGHEST = jax.lax.Precision.HIGHEST


def widest(*arrays: Array) -> np.dtype:
    """The dtype in which these arrays are computed: float64 if one of them is, else float32."""
    sizes = [x.dtype.itemsize for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return jax.dtypes.canonicalize_dtype(np.float64 if 8 in sizes else np.float32)


def promote(*arrays: Array) -> tuple[Array, ...]:
    """The arrays in float64 if one of them is, else in float32."""
    dtype = widest(*arrays)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def positive(name: str, value: Scalar, *like: Array, constant: bool = False) -> float | Array:
    """`value`, or an error if it is not finite and above 0. An array cannot raise under `jit`; a bad one becomes NaN.

    An array has a gradient unless it is `constant`, as all other settings are.
    """
    return _number(name, value, like, "finite and greater than 0", lambda x: (x > 0) & (x < np.inf), constant)


def non_negative(name: str, value: Scalar, *like: Array) -> float | Array:
    return _number(name, value, like, "finite and at least 0", lambda x: (x >= 0) & (x < np.inf))


def fraction(name: str, value: Scalar, *like: Array) -> float | Array:
    return _number(name, value, like, "between 0 and 1", lambda x: (x >= 0) & (x <= 1))


def finite(name: str, value: float) -> float:
    """A number that determines how a loss is computed and must not be an array; an error if it is not finite."""
    if not abs(value) < np.inf:
        raise ValueError(f"`{name}` must be finite, got {value}")
    return float(value)


def _number(
    name: str, value: Scalar, like: tuple[Array, ...], expected: str, test: Callable, constant: bool = True
) -> float | Array:
    if isinstance(value, Array | np.ndarray):
        value = jnp.asarray(value, widest(*like))
        value = jax.lax.stop_gradient(value) if constant else value
        return value + jnp.where(test(value), 0, jnp.nan).astype(value.dtype)
    if not test(value):
        raise ValueError(f"`{name}` must be {expected}, got {value}")
    return float(value)


def check_state(state: Any) -> None:
    for name, x in zip(state._fields, state, strict=True):
        if x.dtype.itemsize < 4:
            raise ValueError(
                f"`state.{name}` must be float32 or float64, got {x.dtype.name}; in half precision small steps are lost; leave the state in float32"
            )


def times_square(temperature: Scalar, value: Array) -> Array:
    """T² value."""
    return temperature**2 * value


def weigh(weight: Scalar, value: Array) -> Array:
    """weight × value; with weight 0 the result is 0 even if the value is infinite."""
    return jnp.where((weight == 0) & jnp.isinf(value), 0, weight * value)


def check_classes(
    logits: Array, class_axis_name: AxisName | None = None, axis_name: AxisName | None = None
) -> tuple[Array | int, int]:
    """The first class of this device, and the number of classes on all devices, which is at least 2."""
    classes, devices = logits.shape[-1], class_devices(class_axis_name, axis_name)
    if classes * devices < 2:
        raise ValueError(f"the logits must have at least 2 classes on the last axis, got shape {list(logits.shape)}")
    return rank(class_axis_name) * classes, classes * devices


def check_fixed(loss: str, **sizes: int) -> None:
    """Raise an error for a size that `jax.export` leaves symbolic, if the computation depends on the size."""
    for name, size in sizes.items():
        if is_symbolic_dim(size):
            raise ValueError(
                f"{loss}: the size of the {name} must be a number, got the symbolic {size}; "
                f"export the loss with a fixed {name}, as in jax.ShapeDtypeStruct((128, ...), dtype)"
            )


def valid_index(index: Array, size: int) -> tuple[Array, Array]:
    """An index that is safe for gathering, and a factor: 1, or NaN where the index was out of range."""
    if index.dtype.itemsize < 4:  # a narrow integer may not hold the size
        index = index.astype(jnp.int32)
    valid = (index >= 0) & (index < size)
    return jnp.where(valid, index, 0).astype(jnp.int32), jnp.where(valid, 1.0, jnp.nan)


def take_class(x: Array, labels: Array) -> Array:
    """`x[..., labels]`, one class for each example."""
    return jnp.take_along_axis(x, labels[..., None], axis=-1)[..., 0]


def sum_of_rows(x: Array) -> Array:
    """`[1, n]`, the sum of `[..., n]`, by a product of matrices: XLA on a CPU takes sixty times as long for `sum`."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return jnp.matmul(jnp.ones((1, rows.shape[0]), x.dtype), rows, precision=HIGHEST)


def is_class(x: Array, labels: Array) -> Array:
    """True at each example's label."""
    return jnp.expand_dims(labels, -1) == jax.lax.broadcasted_iota(labels.dtype, x.shape, x.ndim - 1)


def without_class(x: Array, labels: Array) -> Array:
    """The logits with -inf at each example's label."""
    return jnp.where(is_class(x, labels), -jnp.inf, x)


class Softmax(NamedTuple):
    """p = softmax(x / T), the largest entry of x, and log sum exp((x - largest) / T)."""

    p: Array
    peak: Array
    log_total: Array


def softmax(
    x: Array, temperature: Scalar = 1.0, may_be_empty: bool = False, class_axis_name: AxisName | None = None
) -> Softmax:
    """The softmax over the last axis, which may be spread over devices.

    A row that is all -inf has no distribution: it gives NaN, or p = 0 if it `may_be_empty`. The largest entry is
    subtracted before the division by T, because the rounding of x / T grows with the size of x. (XLA may even compute
    x / T twice, once rounded to find the largest, and once unrounded inside a multiply-add.)
    """
    peak = class_max(x, class_axis_name)
    if may_be_empty:
        peak = jnp.maximum(peak, jnp.finfo(x.dtype).min)
    # limited, because the derivative with respect to T would multiply -inf by the 0 of its class
    below = jnp.maximum(x - peak, -1e5 * temperature)
    weight = jnp.exp(below / temperature)
    total = class_sum(weight, class_axis_name)
    if may_be_empty:
        total = jnp.where(total == 0, 1, total)  # not `maximum`, whose derivative is halved at a total of 1
    return Softmax(weight / total, peak, jnp.log(total))


def dot(q: Array, x: Array) -> Array:
    """sum q x over the last axis, where 0 times infinity is 0."""
    none = q == 0
    # the inner test avoids a NaN in the intermediate result; without the outer one XLA on a CPU takes twice the time
    return jnp.where(none, 0, q * jnp.where(none, 0, x)).sum(-1)


def log_ratio(
    x: Array, y: Array, temperature: Scalar, may_be_empty: bool = False, class_axis_name: AxisName | None = None
) -> tuple[Softmax, Softmax, Array]:
    """p = softmax(x / T), q = softmax(y / T) and log(p / q), which comes from x - y so that close rows keep their digits."""
    # with classes spread over devices, x and y are summed by collectives of the same shape, so equal rows have equal
    # sums
    p, q = (softmax(z, temperature, may_be_empty, class_axis_name) for z in (x, y))
    both = jnp.isneginf(x) & jnp.isneginf(y)
    x, y = (jnp.where(both, 0, z) for z in (x, y))  # -inf - (-inf) would be NaN, at which `jax_debug_nans` stops
    return p, q, ((x - y) - (p.peak - q.peak)) / temperature - (p.log_total - q.log_total)


def close_log_ratio(x: Array, y: Array) -> tuple[Softmax, Softmax, Array]:
    """The same at T = 1, without log sum q e^r, which is 0 except for the rounding of the two normalisers."""
    p, q, ratio = log_ratio(x, y, 1.0)
    return p, q, without_common_error(q.p, ratio)[0]


def without_common_error(q: Array, ratio: Array) -> tuple[Array, Array]:
    """r = log(p / q) minus, in close rows, log sum q e^r, an error common to all r; and which rows are close."""
    close = jnp.abs(ratio).max(-1, keepdims=True) < 1
    return ratio - jnp.log1p((q * jnp.expm1(jnp.where(close, ratio, 0))).sum(-1, keepdims=True)), close


def less_log1p(z: Array) -> Array:
    """z - log(1 + z); for a small z by a series in s = z / (2 + z), because log(1 + z) = 2 atanh(s)."""
    near = jnp.abs(z) < 0.25
    small = jnp.where(near, z, 0)
    s = small / (2 + small)
    square, total = s * s, jnp.zeros_like(s)
    for n in range(19, 1, -2):
        total = total * square + 1 / n
    return jnp.where(near, s * (small - 2 * square * total), z - jnp.log1p(jnp.where(near, 0, z)))


def of_largest(p: Array, x: Array) -> Array:
    """The entry of x at the largest class of p."""
    return jnp.where(p == p.max(-1, keepdims=True), x, -jnp.inf).max(-1, keepdims=True)


def through_softmax(gradient: Array, p: Array) -> Array:
    """p (h - sum p h), given p and p h: the gradient with respect to logits, given h with respect to their softmax.

    First the h of the largest class is subtracted from all h. If that class has nearly all of the probability, its
    small gradient would otherwise be the difference of two large numbers.
    """
    largest = p == p.max(-1, keepdims=True)
    h = jnp.where(largest, gradient / jnp.where(largest, p, 1), 0)
    origin = h.sum(-1, keepdims=True) / largest.sum(-1, keepdims=True, dtype=p.dtype)
    gradient = jnp.where(largest, p * (h - origin), gradient - p * origin)
    return gradient - p * gradient.sum(-1, keepdims=True)


def difference_of_softmaxes(p: Array, q: Array, ratio: Array) -> Array:
    """p - q; where r = log(p / q) is small, it is q (e^r - 1), so that close rows keep their digits."""
    near = (q > 0) & (ratio < 1)
    return jnp.where(near, q * jnp.expm1(jnp.where(near, ratio, 0)), p - q)


def pulled_back(h: Array, p: Array, class_axis_name: AxisName | None = None) -> Array:
    """p (h - sum p h), the gradient through a softmax, accurate even if one class has nearly all of p.

    A class with p = 0 has no effect. An infinite h belongs to a class at -inf in the other distribution. It counts as
    if that distribution gave the class the smallest positive number: the value is infinite, but the gradient is finite
    and leads away from the class.
    """
    h = jnp.where(p == 0, 0, jnp.where(jnp.isposinf(h), -math.log(jnp.finfo(h.dtype).tiny), h))
    centered = h - class_sum(p * h, class_axis_name)
    return p * (centered - class_sum(p * centered, class_axis_name))


def kl_of_softmaxes(
    p: Softmax, q: Softmax, ratio: Array, class_axis_name: AxisName | None = None
) -> tuple[Array, Array]:
    """KL(q || p) over the last axis, and p - q.

    Summed as q (e^r - 1 - r) = p - q - q r, r = log(p / q): the terms are never negative, their sum is KL because p and
    q both sum to one, and an error common to all r (the rounding of the two normalisers) cancels to first order.
    """
    used = jnp.where(q.p == 0, 0, ratio)
    difference = difference_of_softmaxes(p.p, q.p, used)
    near = (jnp.abs(used) < NEAR) & (q.p > 0)
    terms = jnp.where(near, q.p * exp_remainder(jnp.where(near, used, 0)), difference - q.p * used)
    difference, common = less_common_error(difference, q.p, class_axis_name)
    value = (class_sum(terms, class_axis_name) - common**2 / 2).squeeze(-1)
    return jnp.where(value < 0, 0, value), difference


def less_common_error(difference: Array, q: Array, class_axis_name: AxisName | None = None) -> tuple[Array, Array]:
    """p - q = q (e^r - 1) without an error common to all r, so that it sums to 0; and the sum before the correction."""
    total = class_sum(jax.lax.stop_gradient(difference), class_axis_name)
    common = jnp.where(jnp.abs(total) < 0.1, total, 0)  # a large sum means that p or q is empty
    return (difference - common * q) / (1 + common), common


NEAR = 0.5  # below it e^x - 1 - x loses digits


def exp_remainder(x: Array) -> Array:
    """e^x - 1 - x by its series, for |x| < `NEAR`, where the subtraction would lose digits."""
    total = jnp.zeros_like(x)
    for n in range(9 if x.dtype == jnp.float32 else 16, 1, -1):
        total = total * x + 1 / math.factorial(n)
    return x * x * total


def series_of_log1p(x: Array) -> tuple[Array, Array]:
    """log(1 + x) and x - log(1 + x), for -1/2 < x <= 1, both with all their digits.

    With s = x / (2 + x) the logarithm is 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), and x - 2 s is s x.
    """
    s = x / (2 + x)
    square, total = s * s, jnp.zeros_like(x)
    for n in range(13 if x.dtype == jnp.float32 else 33, 1, -2):
        total = total * square + 2 / n
    tail = square * total
    return s * (2 + tail), s * (x - tail)


def kl_and_gradient(
    x: Array, y: Array, temperature: Scalar, class_axis_name: AxisName | None = None
) -> tuple[Array, Array]:
    """KL(softmax(y / T) || softmax(x / T)) over the last axis, and its gradient (p - q) / T."""
    p, q, ratio = log_ratio(x, y, temperature, class_axis_name=class_axis_name)
    value, difference = kl_of_softmaxes(p, q, ratio, class_axis_name)
    return value, difference / temperature


def softmaxes(x: Array, y: Array, temperature: Scalar = 1.0) -> tuple[Array, Array, Array]:
    """p = softmax(x / T), q = softmax(y / T) and p - q, which is accurate for close rows too.

    Both p and q sum to one, so the sum of their differences is an error common to all log ratios, and is removed.
    """
    (p, *_), (q, *_), ratio = log_ratio(x, y, temperature)
    difference = difference_of_softmaxes(p, q, ratio)
    return p, q, difference - p * difference.sum(-1, keepdims=True)


def cross_entropy_and_gradient(x: Array, target: Array, temperature: Scalar = 1.0) -> tuple[Array, Array]:
    """-sum target log p, p = softmax(x / T), and its gradient (p sum target - target) / T."""
    return cross_entropy_of_softmax(softmax(x, temperature), x, target, temperature)


def cross_entropy_of_softmax(p: Softmax, x: Array, target: Array, temperature: Scalar) -> tuple[Array, Array]:
    """The same for a p that may leave out classes of x whose target is 0.

    A class with target 0 contributes nothing, even at p = 0. NaN in any class reaches the value through the first term.
    """
    total = target.sum(-1, keepdims=True)
    value = (p.log_total * total).squeeze(-1) - dot(target, x - p.peak) / temperature
    return value, (p.p * total - target) / temperature


def unit(x: Array) -> Array:
    """x / |x| along the last axis, for any finite x; a row of zeros (or subnormals) becomes zeros, with gradient 0."""
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    zero = scale < jnp.finfo(x.dtype).tiny
    x = x / jnp.where(zero, 1, scale)
    square = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(zero, 0, x / jnp.sqrt(jnp.where(zero, 1, square)))


def unit_pull(x: Array, gradient: Array) -> Array:
    """The gradient with respect to x, given the gradient with respect to `unit(x)`."""
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    zero = scale < jnp.finfo(x.dtype).tiny
    scaled = x / jnp.where(zero, jnp.inf, scale)
    square = jnp.sum(scaled * scaled, -1, keepdims=True)
    length = jnp.where(zero, jnp.inf, jnp.sqrt(jnp.where(zero, 1, square)))
    direction = scaled / length
    across = gradient - (gradient * direction).sum(-1, keepdims=True) * direction
    return across / length / jnp.where(zero, 1, scale)
