"""Factor transfer: compares the factors of two networks after normalising them to unit length."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax

from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.features._maps import (
    across,
    are_equal,
    at_least_one,
    check_channel_axis,
    largest_entry,
    ordered,
    pooled,
    power_of_two,
    scaled,
    signed_power,
    smaller,
    spread,
    unit_and_length,
    unless,
)
from kdlosses.settings import whole


@checked
def factor_transfer_loss(
    student_map: Float[Array, "batch _ _ _"],
    teacher_map: Float[Array, "batch _ _ _"],
    *,
    p1: int = 1,
    p2: float = 1,
    channel_mean: bool = False,
    channel_axis: int = -1,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Factor transfer: the student's factor should match the teacher's, after both are normalised to unit length.

    $$\frac1n\sum_k\big|\varphi(s)_k-\varphi(t)_k\big|^{p_2},\qquad
    \varphi(f)=\frac{f^{p_1}}{\lVert f^{p_1}\rVert}$$

    The power is taken of each entry, and the norm is that of the whole map of an example, which has n entries. With
    `channel_mean` the mean of the powers over channels replaces $f^{p_1}$, and n is the number of positions. For a map
    of zeros φ is 0.

    Args:
        student_map: `[batch, height, width, channels]`, the student's factor: its last map, after a translator.
        teacher_map: `[batch, height, width, channels]`, the teacher's factor: its last map, after a paraphraser;
            constant. Maps of different sizes are averaged first, to the smaller height and to the smaller width.
        p1: a whole number of at least 1, the power of the entries; an odd power keeps their signs. It determines how
            the loss is computed, so it must be a number and not an array.
        p2: p2 ≥ 1, the power of the absolute differences; a number and not an array.
        channel_mean: whether the channels are averaged; student and teacher may then have different numbers of
            channels.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: numbers of channels that differ without `channel_mean`, p1 or p2 below 1, a channel axis other than 1,
            2, 3 or its negative, an unknown reduction.
        TypeError: maps that are not four-axis floating-point arrays.

    Kim et al., *Paraphrasing Complex Network: Network Compression via Factor Transfer*, NeurIPS 2018,
    https://arxiv.org/abs/1802.04977. You provide the paraphraser and the translator.

    >>> import jax.numpy as jnp
    >>> from kdjax import factor_transfer_loss
    >>> s, t = jnp.array([[[[3.0], [4.0]]]]), jnp.array([[[[1.0], [0.0]]]])
    >>> print(f"{factor_transfer_loss(s, t):.4f}")
    0.6000
    """
    check_channel_axis(channel_axis)
    whole(1, p1=p1)
    student_map, teacher_map = ordered(channel_axis, student_map, teacher_map)
    channels = student_map.shape[-1], teacher_map.shape[-1]
    if channels[0] != channels[1] and not channel_mean:
        raise ValueError(
            "`student_map` and `teacher_map` must have the same number of channels, got "
            f"{channels[0]} and {channels[1]}; map the student's channels to the teacher's with `Projector` in `nn`, "
            "or compare the means over channels with `channel_mean=True`"
        )
    values = _factor_transfer(p1, at_least_one("p2", p2), channel_mean)(student_map, teacher_map, where=where)
    return reduce(values, where, reduction, axis_name)


def factor_transfer_and_gradient(
    x: jax.Array, y: jax.Array, p1: int, p2: float, channel_mean: bool
) -> tuple[jax.Array, jax.Array]:
    """The mean of |a/|a| - b/|b||^p2, where a and b are computed from x^p1 and y^p1, and its gradient."""
    height, width = smaller(x, y)
    f, g = pooled(x, height, width), pooled(y, height, width)
    scale, other_scale = largest_entry(f), largest_entry(g)
    if p1 < 32:  # the powers of entries below 2 are within float32
        scale, other_scale = power_of_two(scale), power_of_two(other_scale)
    f, g = scaled(f, scale), scaled(g, other_scale)
    a, b = (z.mean(-1, keepdims=True) if channel_mean else z for z in (f**p1, g**p1))
    shape, number = a.shape, math.prod(a.shape[1:])
    a, b = (z.reshape(z.shape[0], number) for z in (a, b))
    (direction, length), (other, _) = unit_and_length(a), unit_and_length(b)
    difference = unless(are_equal(x, y), direction - other)
    slope = signed_power(difference, p2)
    pull = across(direction, length, slope * (p2 / a.shape[-1])).reshape(shape)
    gradient = pull * f ** (p1 - 1) * (p1 / (f.shape[-1] if channel_mean else 1)) / scale
    return (slope * difference).mean(-1), spread(gradient, *x.shape[1:3])


@functools.cache
def _factor_transfer(p1: int, p2: float, channel_mean: bool) -> Callable[..., jax.Array]:
    return rowwise(functools.partial(factor_transfer_and_gradient, p1=p1, p2=p2, channel_mean=channel_mean))
