"""Compares the similarities between samples of student and teacher."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._numerics import unit
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.relations._pairs import Pairs, over_pairs, products


@checked
def similarity_loss(
    student: Float[Array, "batch student_dim"],
    teacher: Float[Array, "batch teacher_dim"],
    *,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Similarity-preserving distillation: mean squared error between two matrices of inner products with unit rows.

    $$\frac1B\sum_j\big(\hat G_{ij}(s)-\hat G_{ij}(t)\big)^2,\qquad \hat G_i=\frac{G_i}{\|G_i\|},\quad G_{ij}(x)=x_i\cdot x_j$$

    for example i, over every example j of the batch, i included.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. A zero row has similarities of 0, and no gradient through their
        norm; it still has a gradient from the similarities of other rows to it. A single example has loss 0, unless it
        is zero.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Tung and Mori, *Similarity-Preserving Knowledge Distillation*, ICCV 2019, https://arxiv.org/abs/1907.09682. The
    features are divided by the largest entry of the batch first, so small ones keep their digits; the value does not
    change. Released codes divide by norms of at least 1e-12 instead.

    >>> import jax.numpy as jnp
    >>> from kdjax import similarity_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> t = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{similarity_loss(s, t):.4f}")
    0.2929
    """
    return over_pairs("similarity_loss", _values, student, teacher, where, reduction, axis_name)


def _values(pairs: Pairs) -> jax.Array:
    gap = _similarities(pairs.student, pairs.local) - _similarities(pairs.teacher, pairs.local)
    return pairs.mean(jnp.square(gap))


def _similarities(x: jax.Array, local: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Inner products of this device's rows with all rows, made unit rows; 0 if all are zeros (or subnormals)."""
    largest = jax.lax.stop_gradient(jnp.abs(x).max())
    return unit(products(x / jnp.where(largest < jnp.finfo(x.dtype).tiny, 1, largest), local))
