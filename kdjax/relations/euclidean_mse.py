"""Compares the distances between samples of student and teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather, all_gather_constant, local_rows
from kdjax._numerics import HIGHEST, check_fixed, promote, sum_of_rows, unit
from kdjax._reduce import count, reduce, zero_masked
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.relations._pairs import gram


@checked
def euclidean_mse_loss(
    student: Float[Array, "batch student_dim"],
    teacher: Float[Array, "batch teacher_dim"],
    *,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Mean squared error between the two matrices of Euclidean distances of unit-normalised features.

    $$\frac1B\sum_j\big(d_{ij}(s)-d_{ij}(t)\big)^2,\qquad d_{ij}(x)=\left\|\frac{x_i}{\|x_i\|}-\frac{x_j}{\|x_j\|}\right\|$$

    for example i, over every example j of the batch, i included (at distance 0).

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. Two equal rows have distance 0, with gradient 0. A zero row
        stays at the origin, so its distance to every row that is not zero is 1.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's EU_MSELoss, whose code clamps the squared distance to at least 1e-12. The distances are
    computed by one matrix product. If some pair is so close that this would lose precision, they are computed from the
    differences, a row at a time. Under `vmap` both ways are computed.

    >>> import jax.numpy as jnp
    >>> from kdjax import euclidean_mse_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> t = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{euclidean_mse_loss(s, t):.4f}")
    1.0000
    """
    check_fixed("euclidean_mse_loss", batch=student.shape[0])
    student, teacher = promote(student, teacher)
    student, teacher = (unit(x) for x in zero_masked(where, student, teacher))
    local = functools.partial(local_rows, rows=len(student), axis_name=axis_name)
    student, teacher = all_gather(student, axis_name), all_gather_constant(teacher, axis_name)
    kept = jnp.ones(len(student), bool) if where is None else all_gather_constant(where, axis_name)
    place = jnp.arange(len(student))
    partners = local(kept)[:, None] & kept[None] & (local(place)[:, None] != place[None])
    gap = _distances(student, partners, local) - _distances(teacher, partners, local)
    pairs = jnp.where(partners, jnp.square(gap), 0)
    return reduce(pairs.sum(1) / count(kept, student.dtype), where, reduction, axis_name)


def _distances(x: jax.Array, partners: jax.Array, local: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """|x_i - x_j| for this device's i and every j; 0 for pairs that are not partners."""
    centered = x - jax.lax.stop_gradient(sum_of_rows(x) / len(x))  # a common part would only cost digits
    ours, length = local(centered), jnp.square(centered).sum(-1)
    product = gram(centered) if ours is centered else jnp.matmul(ours, centered.T, precision=HIGHEST)
    square = local(length)[:, None] + length[None] - 2 * product
    clear = (~partners | (square * 64 > length.max(initial=0))).all()

    def by_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _root(jnp.square(row[0][None] - x).sum(-1), row[1])

    rows: Callable[[], Array] = lambda: jax.lax.map(jax.checkpoint(by_row), (local(x), partners))  # noqa: E731
    return jax.lax.cond(clear, lambda: _root(square, partners), rows)


def _root(square: jax.Array, partners: jax.Array) -> jax.Array:
    apart = partners & ~(square <= 0)
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
