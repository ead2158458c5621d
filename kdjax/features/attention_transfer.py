"""Attention transfer: where in a map the activations are large."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.features._maps import (
    across,
    are_equal,
    are_moderate,
    at_least_one,
    check_maps,
    largest_entry,
    ordered,
    pooled,
    scaled,
    signed_power,
    smaller,
    spread,
    unit_and_length,
    unless,
)


@checked
def attention_transfer_loss(
    student_maps: Sequence[Float[Array, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Array, "batch _ _ _"]],
    *,
    p: float = 2,
    channel_axis: int = -1,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Attention transfer: where the student's activations are large, compared with where the teacher's are.

    $$\sum_{\text{maps}}\frac1{HW}\sum_x\big(\hat a_x-\hat b_x\big)^2,\qquad
    a_x=\frac1C\sum_c|f_{cx}|^p,\quad\hat a=\frac a{\lVert a\rVert}$$

    f is a map of the student, and b is computed from the teacher's map in the same way. For a map of zeros â is 0.

    Args:
        student_maps: maps `[batch, height, width, channels]`, any number of them, of any sizes.
        teacher_maps: as many, of any sizes and numbers of channels; constant. Two maps of different sizes are averaged
            first, to the smaller height and to the smaller width.
        p: p ≥ 1, the power: the larger it is, the more the largest activations count. It determines how the loss is
            computed, so it must be a number and not an array.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers of maps that differ, p below 1 or not finite, a channel axis other than 1, 2, 3 or
            its negative, an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point arrays.

    Zagoruyko and Komodakis, *Paying More Attention to Attention*, ICLR 2017, https://arxiv.org/abs/1612.03928. The
    paper uses the norm of the difference; the authors' code uses the mean of squares, as this function does.

    >>> import jax.numpy as jnp
    >>> from kdjax import attention_transfer_loss
    >>> s, t = jnp.ones((1, 1, 2, 3)), jnp.array([[[[1.0], [0.0]]]])
    >>> print(f"{attention_transfer_loss([s], [t]):.4f}")
    0.2929
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    compare = _attention_transfer(at_least_one("p", p))
    maps = [
        compare(*ordered(channel_axis, *both), where=where) for both in zip(student_maps, teacher_maps, strict=True)
    ]
    return reduce(jnp.stack(maps).sum(0), where, reduction, axis_name)


def attention_transfer_and_gradient(x: jax.Array, y: jax.Array, p: float) -> tuple[jax.Array, jax.Array]:
    """The mean of (a/|a| - b/|b|)^2 over positions, with a, b the channel means of |x|^p, |y|^p, and its gradient."""
    height, width = smaller(x, y)
    f, g = pooled(x, height, width), pooled(y, height, width)
    a, b = _attention(f, p), _attention(g, p)

    def compared(a: jax.Array, b: jax.Array, f: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        (direction, length), (other, _) = unit_and_length(a), unit_and_length(b)
        difference = unless(are_equal(x, y), direction - other)
        pull = across(direction, length, difference * (2 * p / f.shape[-1] / a.shape[-1]))
        gradient = pull.reshape(*f.shape[:3], 1) / scale * signed_power(f, p)
        return jnp.square(difference).mean(-1), spread(gradient, *x.shape[1:3])

    def of_scaled() -> tuple[jax.Array, jax.Array]:
        scale = largest_entry(f)
        near = scaled(f, scale)
        return compared(_attention(near, p), _attention(scaled(g, largest_entry(g)), p), near, scale)

    moderate = are_moderate(a.max(-1), b.max(-1))
    return jax.lax.cond(moderate, lambda: compared(a, b, f, jnp.ones((), a.dtype)), of_scaled)


def _attention(f: jax.Array, p: float) -> jax.Array:
    """The mean of |f|^p over channels, `[batch, positions]`."""
    return (f * signed_power(f, p)).mean(-1).reshape(f.shape[0], f.shape[1] * f.shape[2])


@functools.cache
def _attention_transfer(p: float) -> Callable[..., jax.Array]:
    return rowwise(functools.partial(attention_transfer_and_gradient, p=p))
