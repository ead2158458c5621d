"""The numerical care that several losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim

from kdjax._typing import Scalar

HIGHEST = jax.lax.Precision.HIGHEST


def promote(*arrays: Array) -> tuple[Array, ...]:
    """All in float64 if one of them is, else in float32."""
    widest = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    dtype = jax.dtypes.canonicalize_dtype(max(widest, np.dtype(np.float32), key=lambda dtype: dtype.itemsize))
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def positive(name: str, value: Scalar, like: Array) -> float | Array:
    """`value` if it is finite and above 0; an array cannot raise under `jit`, so a bad one becomes NaN."""
    return _number(name, value, like, "finite and greater than 0", lambda x: (x > 0) & (x < np.inf))


def non_negative(name: str, value: Scalar, like: Array) -> float | Array:
    return _number(name, value, like, "finite and at least 0", lambda x: (x >= 0) & (x < np.inf))


def fraction(name: str, value: Scalar, like: Array) -> float | Array:
    return _number(name, value, like, "between 0 and 1", lambda x: (x >= 0) & (x <= 1))


def _number(name: str, value: Scalar, like: Array, expected: str, test: Callable) -> float | Array:
    if isinstance(value, Array | np.ndarray):
        value = jnp.asarray(value, like.dtype)
        return jnp.where(test(value), value, jnp.nan)
    if not test(value):
        raise ValueError(f"`{name}` must be {expected}, got {value}")
    return float(value)


def check_state(state: Any) -> None:
    for name, x in zip(state._fields, state, strict=True):
        if x.dtype.itemsize < 4:
            raise ValueError(
                f"`state.{name}` must be float32 or float64, got {x.dtype.name}; in half precision small steps are lost"
            )


def weigh(weight: Scalar, value: Array) -> Array:
    """weight × value. What weighs 0 is not there, be it infinite."""
    return jnp.where((weight == 0) & jnp.isinf(value), 0, weight * value)


def check_classes(logits: Array) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(f"the logits must have at least 2 classes on the last axis, got shape {list(logits.shape)}")


def check_fixed(loss: str, **sizes: int) -> None:
    """Refuse a size that `jax.export` leaves open, where the size says how the computation goes."""
    for name, size in sizes.items():
        if is_symbolic_dim(size):
            raise ValueError(
                f"{loss}: the size of the {name} must be a number, got the symbolic {size}; "
                f"export the loss with a fixed {name}, as in jax.ShapeDtypeStruct((128, ...), dtype)"
            )


def valid_index(index: Array, size: int) -> tuple[Array, Array]:
    """An index that can be gathered with, and a factor: 1, or NaN where the index was out of range."""
    if index.dtype.itemsize < 4:  # which may not hold the size
        index = index.astype(jnp.int32)
    valid = (index >= 0) & (index < size)
    return jnp.where(valid, index, 0).astype(jnp.int32), jnp.where(valid, 1.0, jnp.nan)


def take_class(x: Array, labels: Array) -> Array:
    """`x[..., labels]`, one class an example."""
    return jnp.take_along_axis(x, labels[..., None], axis=-1)[..., 0]


def is_class(x: Array, labels: Array) -> Array:
    """True at each example's label."""
    return jnp.expand_dims(labels, -1) == jax.lax.broadcasted_iota(labels.dtype, x.shape, x.ndim - 1)


def log_softmax(x: Array, temperature: Scalar = 1.0) -> Array:
    """Of x / temperature over the last axis; -inf everywhere, with gradient 0, where every entry is -inf."""
    _, _, z, log_total = softmax(x, temperature)
    return z - log_total


def softmax(x: Array, temperature: Scalar) -> tuple[Array, Array, Array, Array]:
    """softmax(x / T), the largest entry of x, z = (x - largest) / T and log sum exp z.

    The largest entry is taken off before the division: XLA may compute x / T twice, rounded to find the largest and
    unrounded inside a multiply-add, and the largest would then not be 0 above itself.
    """
    peak = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    z = (x - peak) / temperature
    weight = jnp.exp(z)
    total = jnp.sum(weight, -1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return weight / total, peak, z, jnp.log(total)


def rowwise(value_and_gradient: Callable[..., tuple[Array, Array]]) -> Callable[..., Array]:
    """A function of rows from one that returns its value and its gradient with respect to its first argument.

    The value of a row depends on that row alone; every other argument is constant. The gradient is itself made of
    differentiable operations, so the result can be differentiated again.
    """

    @jax.custom_jvp
    def value(x: Array, *constants: Array) -> Array:
        return value_and_gradient(x, *constants)[0]

    @value.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        result, gradient = value_and_gradient(*primals)
        return result, jnp.sum(gradient * tangents[0], -1)

    return value


def log_ratio(x: Array, y: Array, temperature: Scalar) -> tuple[Array, Array, Array]:
    """p = softmax(x / T), q = softmax(y / T) and log(p / q), which comes from x - y so that close rows keep their digits."""
    p, peak_x, _, log_total_x = softmax(x, temperature)
    q, peak_y, _, log_total_y = softmax(y, temperature)
    both = jnp.isneginf(x) & jnp.isneginf(y)
    x, y = (jnp.where(both, 0, z) for z in (x, y))  # whose difference is no NaN, which `jax_debug_nans` would stop at
    r = ((x - y) - (peak_x - peak_y)) / temperature - (log_total_x - log_total_y)
    return p, q, jnp.where(both, 0, r)


def kl_and_gradient(x: Array, y: Array, temperature: Scalar) -> tuple[Array, Array]:
    """KL(softmax(y / T) || softmax(x / T)) over the last axis, with its gradient (p - q) / T.

    Summed as q (e^r - 1 - r), r = log(p / q): the terms are never negative, their sum is KL because p and q both
    sum to one, and an error common to all r (the rounding of the two normalisers) cancels to first order.
    """
    p, q, r = log_ratio(x, y, temperature)
    near = (q > 0) & (r < 1)
    growth = jnp.expm1(jnp.where(near, r, 0))
    used = jnp.where(q > 0, r, 0)
    terms = jnp.where(near, q * (growth - used), (p - q) - q * used)
    return jnp.maximum(terms, 0).sum(-1), jnp.where(near, q * growth, p - q) / temperature


kl_divergence = rowwise(kl_and_gradient)


@rowwise
def cross_entropy(x: Array, target: Array, temperature: Scalar) -> tuple[Array, Array]:
    """-sum target log p, p = softmax(x / T), of which the gradient is (p sum target - target) / T.

    A class with target 0 adds nothing, even at p = 0.
    """
    p, _, z, log_total = softmax(x, temperature)
    total = target.sum(-1, keepdims=True)
    none = target == 0
    # asked twice: within, so that no NaN is on the way; without, or XLA on a CPU takes twice the time
    value = (log_total * total).squeeze(-1) - jnp.where(none, 0, target * jnp.where(none, 0, z)).sum(-1)
    return value, (p * total - target) / temperature


def binary_and_others(x: Array, label: Array, temperature: Scalar) -> tuple[Array, Array]:
    """Logits, at temperature 1, of (the label, any other class); and x without the label."""
    others = jnp.where(label, -jnp.inf, x)
    _, peak, _, log_total = softmax(others, temperature)
    largest = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    target = jnp.sum(jnp.where(label, x, 0), -1, keepdims=True)
    rest = (peak - largest) / temperature + log_total
    rest = jnp.where(jnp.isneginf(others).all(-1, keepdims=True), -jnp.inf, rest)
    return jnp.concatenate([(target - largest) / temperature, rest], -1), others


def unit(x: Array) -> Array:
    """x / |x| along the last axis, for any finite x; a row of zeros (or subnormals) becomes zeros, with gradient 0."""
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    zero = scale < jnp.finfo(x.dtype).tiny
    x = x / jnp.where(zero, 1, scale)
    square = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(zero, 0, x / jnp.sqrt(jnp.where(zero, 1, square)))
