"""Shared by the losses of feature maps: checks of the lists, and pooling of maps of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdjax._numerics import HIGHEST
from kdjax._typing import Array

PROJECTOR = "`Projector` in `nn` maps a student's channels to the teacher's; resize it to the same height and width"


def check_channel_axis(channel_axis: int) -> None:
    if channel_axis not in (-3, -2, -1, 1, 2, 3):
        raise ValueError(f"`channel_axis` must be one of -3, -2, -1, 1, 2, 3, got {channel_axis}")


def check_maps(student_maps: Sequence[Array], teacher_maps: Sequence[Array], channel_axis: int) -> None:
    """Raise an error for empty lists, lists of different lengths, and an axis that cannot be the channels'."""
    if not student_maps or len(student_maps) != len(teacher_maps):
        raise ValueError(
            "`student_maps` and `teacher_maps` must hold the same number of maps, at least one, got "
            f"{len(student_maps)} and {len(teacher_maps)}; give only the teacher's maps that correspond to the student's"
        )
    check_channel_axis(channel_axis)


def check_shapes(student_maps: Sequence[Array], teacher_maps: Sequence[Array], projection: str) -> None:
    """Raise an error if the shapes of maps differ; `projection` says how to make them equal."""
    for i, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        check_shape(f"student_maps[{i}]", student, f"teacher_maps[{i}]", teacher, projection)


def check_shape(student_name: str, student: Array, teacher_name: str, teacher: Array, projection: str) -> None:
    """The same for one map."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"`{student_name}` and `{teacher_name}` must have the same shape, got {list(student.shape)} "
            f"and {list(teacher.shape)}; {mend(student, teacher, projection)}"
        )


def mend(student: Array, teacher: Array, projection: str) -> str:
    if sorted(student.shape) == sorted(teacher.shape):
        return "use the same order of axes for both, and give the axis of the channels as `channel_axis`"
    return projection


def by_channels(x: Array, channel_axis: int) -> jax.Array:
    """A map as `[batch, channels, positions]`."""
    x = jnp.moveaxis(x, channel_axis, 1)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def at_least_one(name: str, value: float) -> float:
    """A power, which determines how a loss is computed and must not be an array."""
    if not 1 <= value < np.inf:
        raise ValueError(f"`{name}` must be finite and at least 1, got {value}")
    return float(value)


def ordered(channel_axis: int, *maps: Array) -> tuple[jax.Array, ...]:
    """Maps as `[batch, height, width, channels]`."""
    return tuple(jnp.moveaxis(x, channel_axis, -1) for x in maps)


def smaller(x: Array, y: Array) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps `[batch, height, width, channels]`."""
    return min(x.shape[1], y.shape[1]), min(x.shape[2], y.shape[2])


def pooled_alike(student_map: Array, teacher_map: Array, channel_axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """Both as `[batch, height, width, channels]`, averaged to the smaller height and to the smaller width."""
    student, teacher = ordered(channel_axis, student_map, teacher_map)
    size = smaller(student, teacher)
    return pooled(student, *size), pooled(teacher, *size)


def pooled(x: Array, height: int, width: int) -> jax.Array:
    """A map `[batch, height, width, channels]` averaged to a height and a width."""
    if x.shape[1] != height:
        x = jnp.einsum("rh,bhwc->brwc", pooling(height, x.shape[1], x.dtype), x, precision=HIGHEST)
    if x.shape[2] != width:
        x = jnp.einsum("qw,bhwc->bhqc", pooling(width, x.shape[2], x.dtype), x, precision=HIGHEST)
    return jnp.asarray(x)


def spread(gradient: Array, height: int, width: int) -> jax.Array:
    """The gradient with respect to a map of this height and width, given the gradient with respect to the pooled map."""
    if gradient.shape[1] != height:
        rows = pooling(gradient.shape[1], height, gradient.dtype)
        gradient = jnp.einsum("rh,brwc->bhwc", rows, gradient, precision=HIGHEST)
    if gradient.shape[2] != width:
        columns = pooling(gradient.shape[2], width, gradient.dtype)
        gradient = jnp.einsum("qw,bhqc->bhwc", columns, gradient, precision=HIGHEST)
    return jnp.asarray(gradient)


def pooling(bins: int, length: int, dtype: np.dtype) -> np.ndarray:
    """The matrix that averages `length` positions into `bins`, which overlap if the length is not a multiple."""
    start = np.arange(bins) * length // bins
    stop = -(-(np.arange(bins) + 1) * length // bins)
    position = np.arange(length)
    inside = (position >= start[:, None]) & (position < stop[:, None])
    return (inside / inside.sum(1, keepdims=True)).astype(dtype)


def largest_entry(x: Array) -> jax.Array:
    """The largest entry of each example, a constant divisor; infinite for a map of zeros (or subnormals)."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), (1, 2, 3), keepdims=True))
    return jnp.where(largest < jnp.finfo(x.dtype).tiny, jnp.inf, largest)


def scaled(x: Array, scale: Array) -> jax.Array:
    """x / scale, and 0 where the scale is infinite. Without the barrier, XLA turns (x/s)(x/s) into x x / (s s)."""
    return jax.lax.optimization_barrier(jnp.where(jnp.isinf(scale), 0, x / scale))


def are_moderate(*sums: Array) -> jax.Array:
    """Whether sums of powers are so moderate that their terms need no scaling."""
    return jnp.stack([((x > 1e-24) & (x < 1e24)).all() for x in sums]).all()


def power_of_two(x: Array) -> jax.Array:
    """The largest power of two that is at most each of these positive numbers; dividing by it causes no rounding."""
    return jnp.where(jnp.isinf(x), x, x / (2 * jnp.frexp(x)[0]))


def unit_and_length(x: Array) -> tuple[jax.Array, jax.Array]:
    """x / |x| over the last axis and |x|, for any finite x; for zeros (or subnormals) 0 and infinity.

    `unit` divides by the largest entry first, which rounds. This function does not, so rows of equal length keep the
    digits that they share.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    scale = power_of_two(jnp.where(largest < jnp.finfo(x.dtype).tiny, jnp.inf, largest))
    x = scaled(x, scale)
    square = jnp.sum(x * x, -1, keepdims=True)
    length = jnp.sqrt(jnp.where(square == 0, 1, square))
    return x / length, length * scale


def across(direction: Array, length: Array, gradient: Array) -> jax.Array:
    """The gradient with respect to x, given its direction and length, and the gradient for the direction."""
    return (gradient - (gradient * direction).sum(-1, keepdims=True) * direction) / length


def signed_power(x: Array, p: float) -> jax.Array:
    """|x|^(p - 1) sign(x), and 0 at 0: times x it is |x|^p, and times p the derivative of that."""
    if p == int(p):
        power = x ** (int(p) - 1)
        return power * jnp.sign(x) if p % 2 else power
    zero = x == 0
    return jnp.abs(jnp.where(zero, 1, x)) ** (p - 1) * jnp.sign(x)


def are_equal(x: Array, y: Array) -> jax.Array | None:
    """`[batch]`: whether the maps of an example are equal; None if they cannot be."""
    if x.shape != y.shape:
        return None
    first = x[:, 0, 0, 0] == y[:, 0, 0, 0]
    return jax.lax.cond(first.any(), lambda: (x == y).all((1, 2, 3)), lambda: first)


def unless(equal: Array | None, difference: Array) -> jax.Array:
    """The difference of the results of two maps; exactly 0 for equal maps, which a compiler may round differently."""
    if equal is None:
        return jnp.asarray(difference)
    equal = equal.reshape(-1, *(1,) * (difference.ndim - 1))
    return difference - jax.lax.stop_gradient(jnp.where(equal, difference, 0))
