"""Neuron selectivity transfer: the distribution of the channels over positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax._numerics import HIGHEST
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.features._maps import (
    across,
    are_equal,
    check_maps,
    ordered,
    pooled,
    smaller,
    spread,
    unit_and_length,
    unless,
)


@checked
def nst_loss(
    student_maps: Sequence[Float[Array, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Array, "batch _ _ _"]],
    *,
    channel_axis: int = -1,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Neuron selectivity transfer: the distribution of the channels over positions should match the teacher's.

    $$\sum_{\text{maps}}\left\|\frac{UU^\top}{C_s}-\frac{VV^\top}{C_t}\right\|_F^2$$

    The columns of U are the student's channels over positions, each of unit length, and those of V the teacher's. It is
    the squared maximum mean discrepancy of the two sets of channels under the kernel $(u\cdot v)^2$. A channel of zeros is
    a column of zeros.

    Args:
        student_maps: maps `[batch, height, width, channels]`, any number of them, of any sizes.
        teacher_maps: as many, of any sizes and numbers of channels; constant. Two maps of different sizes are averaged
            first, to the smaller height and to the smaller width.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers of maps that differ, a channel axis other than 1, 2, 3 or its negative, an unknown
            reduction.
        TypeError: maps that are not a list of four-axis floating-point arrays.

    Huang and Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017,
    https://arxiv.org/abs/1707.01219. The released codes add and subtract three means of kernels.

    >>> import jax.numpy as jnp
    >>> from kdjax import nst_loss
    >>> s, t = jnp.array([[[[1.0], [0.0]]]]), jnp.array([[[[0.0], [3.0]]]])
    >>> print(f"{nst_loss([s], [t]):.4f}")
    2.0000
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    maps = [_nst(*ordered(channel_axis, *both), where=where) for both in zip(student_maps, teacher_maps, strict=True)]
    return reduce(jnp.stack(maps).sum(0), where, reduction, axis_name)


def nst_and_gradient(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|U U' / C_s - V V' / C_t|^2, where the columns of U and V are the channels of x and y, and its gradient."""
    height, width = smaller(x, y)
    f, g = (
        jnp.moveaxis(pooled(z, height, width).reshape(z.shape[0], height * width, z.shape[-1]), 2, 1) for z in (x, y)
    )
    (direction, length), (other, _) = unit_and_length(f), unit_and_length(g)
    root = math.sqrt(f.shape[1])
    value, pull = _products(direction / root, other / math.sqrt(g.shape[1]), are_equal(x, y))
    gradient = jnp.moveaxis(across(direction, length, pull * (4 / root)), 1, 2).reshape(
        f.shape[0], height, width, f.shape[1]
    )
    return value, spread(gradient, *x.shape[1:3])


def _products(u: jax.Array, v: jax.Array, equal: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """|M|^2 and M u, where M = u' u - v' v, for u and v `[batch, channels, positions]`.

    M is computed in blocks of rows; with many positions, a block is about as large as u.
    """
    positions = u.shape[2]
    number = -(-positions // max(u.shape[1], v.shape[1], 64))
    size = -(-positions // number)

    @jax.checkpoint
    def block(start: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        parts = (jax.lax.dynamic_slice_in_dim(x, start, size, 2) for x in (long_u, long_v))
        m, less = (
            jnp.einsum("bcr,bcn->brn", part, x, precision=HIGHEST) for part, x in zip(parts, (u, v), strict=True)
        )
        m = unless(equal, m - less)
        return jnp.square(m).sum((1, 2)), jnp.einsum("brn,bcn->bcr", m, u, precision=HIGHEST)

    long_u, long_v = (jnp.pad(x, ((0, 0), (0, 0), (0, number * size - positions))) for x in (u, v))
    if number == 1:
        return block(0)
    values, parts = jax.lax.map(block, jnp.arange(number) * size)
    together = jnp.moveaxis(parts, 0, 2).reshape(*u.shape[:2], number * size)
    return values.sum(0), together[:, :, :positions]


_nst = rowwise(nst_and_gradient)
