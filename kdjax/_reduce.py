"""Reductions, and the removal of masked examples from a computation."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kdjax._collectives import all_sum, size
from kdjax._typing import Array, AxisName, Reduction


def zero_masked(where: Array | None, *arrays: Array) -> tuple[jax.Array, ...]:
    """Set masked examples to zero, so that their contents reach neither a value nor a gradient."""
    if where is None:
        return tuple(map(jnp.asarray, arrays))
    return tuple(jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, _zero(x)) for x in arrays)


def _zero(x: Array) -> bool | int:
    return False if x.dtype == bool else 0


def reduce(values: Array, where: Array | None, reduction: Reduction, axis_name: AxisName | None = None) -> jax.Array:
    """`"mean"`: the sum over kept examples divided by their number; `"sum"`; `"none"`: one value per example.

    With several devices, the mean of what they return is the result for the whole batch.
    """
    check_reduction(reduction)
    (values,) = zero_masked(where, values)
    if reduction == "none":
        return values
    return reduce_sum(values.sum(), values.size, where, reduction, axis_name)


def reduce_sum(
    value: jax.Array, number: int, where: Array | None, reduction: Reduction, axis_name: AxisName | None = None
) -> jax.Array:
    """The `"mean"` or `"sum"` of `number` examples, from the sum over those that are kept."""
    devices = size(axis_name)
    if reduction == "sum":
        return value * devices
    return value / (max(number, 1) if where is None else count(where, value.dtype, axis_name) / devices)


def weighted_mean(
    value: jax.Array, weights: Array, where: Array | None, axis_name: AxisName | None = None
) -> jax.Array:
    """The weighted mean over kept examples, given their weighted sum; the divisor is 1 if the weights sum to 0."""
    (weights,) = zero_masked(where, weights.astype(value.dtype))
    total = all_sum(jax.lax.stop_gradient(weights.sum()), axis_name)
    return value / (jnp.where(total == 0, 1, total) / size(axis_name))


def count(kept: Array, dtype: DTypeLike, axis_name: AxisName | None = None) -> jax.Array:
    """The number of kept examples on all devices, at least one."""
    return jnp.maximum(all_sum(kept.sum(dtype=dtype), axis_name), 1)


def check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f'`reduction` must be one of "mean", "sum", "none", got {reduction!r}')
