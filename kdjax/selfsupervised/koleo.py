"""KoLeo: pushes the rows of a batch away from their nearest neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather, all_gather_constant, local_rows, rank
from kdjax._numerics import HIGHEST, check_fixed, promote, sum_of_rows, unit
from kdjax._reduce import reduce, zero_masked
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked

EPSILON = 1e-8


@checked
def koleo_loss(
    student: Float[Array, "batch dim"],
    *,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Minus the logarithm of the distance to the nearest neighbour in the batch, which spreads features over the sphere.

    $$-\log\big(\|u_i-u_j+\varepsilon\|+\varepsilon\big),\qquad u_i=\frac{x_i}{\|x_i\|},\quad
    j=\operatorname{argmax}_{k\ne i}u_i\cdot u_k,\quad\varepsilon=10^{-8}$$

    for example i. There is no teacher. The gradient flows to both rows of a pair, but not through the choice of j.

    Args:
        student: `[batch, dim]`, of one view, because two views of an image would be each other's neighbours.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. If several neighbours have the same distance, the first is used.
        With fewer than two kept examples the loss is 0. Equal rows give about 17, with a large, finite gradient; a zero
        row has a cosine of 0 to all others, and no gradient.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Sablayrolles et al., *Spreading Vectors for Similarity Search*, ICLR 2019, https://arxiv.org/abs/1806.03198, as in
    DINOv2, whose code sets the cosine of a row with itself to -1. For two opposite rows, the first is then its own
    neighbour, and the loss is 8.4 instead of -0.69. In this function no row is its own neighbour. Distances are
    computed from differences. The neighbour is found by one matrix product, and if that is not precise enough, by
    differences too.

    >>> import jax.numpy as jnp
    >>> from kdjax import koleo_loss
    >>> print(f"{koleo_loss(jnp.array([[1.0, 0.0], [-1.0, 0.0]])):.4f}")
    -0.6931
    """
    check_fixed("koleo_loss", batch=student.shape[0])
    (rows,) = zero_masked(where, *promote(student))
    local = functools.partial(local_rows, rows=len(rows), axis_name=axis_name)
    every = all_gather(rows, axis_name)
    x = unit(every)
    kept = jnp.ones(len(x), bool) if where is None else all_gather_constant(where, axis_name)
    place = jnp.arange(len(x))
    partners = local(kept)[:, None] & kept[None] & (local(place)[:, None] != place[None])
    nearest = _nearest(jax.lax.stop_gradient(x), partners, local)
    gap = local(x) - x[nearest]
    # if two rows are each other's nearest, the later one uses the negated gap of the other, so that their gradients are
    # added in the gap, where close rows nearly cancel
    back = nearest - jnp.asarray(rank(axis_name) * len(rows), nearest.dtype)
    here = (back >= 0) & (back < len(rows)) & (nearest < local(place))
    back = jnp.where(here, back, 0)
    gap = jnp.where((here & (nearest[back] == local(place)))[:, None], -gap[back], gap)
    equal = (rows == every[nearest]).all(-1, keepdims=True)  # equal rows may have different unit rows, by rounding
    gap = gap - jax.lax.stop_gradient(jnp.where(equal, gap, 0))
    square = jnp.square(gap + EPSILON).sum(-1)
    apart = ~(square <= 0)
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
    return reduce(jnp.where(partners.any(1), -jnp.log(distance + EPSILON), 0), where, reduction, axis_name)


def _nearest(x: jax.Array, partners: jax.Array, local: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The index of the partner with the largest cosine (the first of equal ones) for this device's rows.

    The cosine is found from 2 - 2 cos = |x_i - x_j|^2, to which a zero row adds 1. If a matrix product cannot decide
    the partner of a row, because it is very close or another is nearly as close, that row is computed separately.
    """
    if not len(x):
        return jnp.zeros(0, int)
    digits, zero = jnp.finfo(x.dtype).eps, (x == 0).all(-1).astype(x.dtype)
    centered = x - sum_of_rows(x) / len(x)  # a part common to all rows would only cost digits
    length = jnp.square(centered).sum(-1) + zero
    product = jnp.matmul(local(centered), centered.T, precision=HIGHEST)
    square = jnp.where(partners, local(length)[:, None] + length[None] - 2 * product, jnp.inf)
    found, least, largest = square.argmin(1), square.min(1), length.max()
    rival = jnp.where(jnp.arange(len(x))[None] == found[:, None], jnp.inf, square).min(1)
    is_open = partners.any(1) & ((rival <= least + 16 * digits * largest) | ~(least * 64 > largest))

    def by_row(row: tuple[jax.Array, ...]) -> jax.Array:
        is_open, found, ours, own_zero, partners = row

        def first() -> jax.Array:
            square = jnp.where(partners, jnp.square(ours[None] - x).sum(-1) + zero + own_zero, jnp.inf)
            return (square <= square.min() * (1 + 8 * digits)).argmax()

        return jax.lax.cond(is_open, first, lambda: found)

    rows = is_open, found, local(x), local(zero), partners
    return jax.lax.cond(is_open.any(), lambda: jax.lax.map(by_row, rows), lambda: found)
