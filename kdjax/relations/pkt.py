"""Compares the conditional probabilities of samples of student and teacher."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._numerics import unit
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.relations._pairs import Pairs, over_pairs, products

EPSILON = 1e-7  # part of the published formula: added to the norms, and inside the logarithm


@checked
def pkt_loss(
    student: Float[Array, "batch student_dim"],
    teacher: Float[Array, "batch teacher_dim"],
    *,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Probabilistic knowledge transfer: KL divergence between the conditional probabilities of the examples.

    $$\frac1B\sum_jq_{ij}\log\frac{q_{ij}+\varepsilon}{p_{ij}+\varepsilon},\qquad
    p_{ij}=\frac{1+\cos(s_i,s_j)}{\sum_k1+\cos(s_i,s_k)},\quad\cos(x,y)=\frac{x\cdot y}{(\|x\|+\varepsilon)(\|y\|+\varepsilon)}$$

    for example i, over every example j of the batch, i included; q is the same for the teacher, and ε is 1e-7.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`; at least -1e-7. A zero row has cosine 0 with every row, with
        gradient 0.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Passalis and Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*, ECCV 2018,
    https://arxiv.org/abs/1803.10837. As in the authors' code, the mean is over all B² entries, so the value is the mean
    KL of a row divided by B. The pair of i with itself is included, which the paper leaves out. The gradient of the
    authors' code at a zero row is NaN. If two rows are nearly opposite, 1 + cos is computed from the rows' sums, one
    row at a time. Under `vmap` both ways are computed.

    >>> import jax.numpy as jnp
    >>> from kdjax import pkt_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> t = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{pkt_loss(s, t):.4f}")
    0.0294
    """
    return over_pairs("pkt_loss", _values, student, teacher, where, reduction, axis_name)


def _values(pairs: Pairs) -> jax.Array:
    p, q = (_probabilities(x, pairs) for x in (pairs.student, pairs.teacher))
    gap = q - p  # its sum, which is 0 except for rounding, is subtracted
    terms = q * jnp.log1p(gap / (p + EPSILON)) - gap
    return pairs.mean(terms)


def _probabilities(x: jax.Array, pairs: Pairs) -> jax.Array:
    """The probabilities of all rows, given each of this device's rows; 0 for masked rows."""
    length = _length(x)
    share, rest = length / (length + EPSILON), EPSILON / (length + EPSILON)
    ours, our_rest = pairs.local(share)[:, None], pairs.local(rest)[:, None]
    # 1 + cos, computed without cancellation
    similarity = our_rest + ours * (rest[None] + share[None] * _one_plus_cosine(unit(x), pairs.local))
    similarity = jnp.where(pairs.kept[None], similarity, 0)
    total = similarity.sum(1, keepdims=True)
    return similarity / jnp.where(total == 0, 1, total)


def _length(x: jax.Array) -> jax.Array:
    """|x|, with gradient 0 at 0."""
    limits = jnp.finfo(x.dtype)
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1))
    zero = scale < limits.tiny
    square = jnp.square(x / jnp.where(zero, 1, scale)[:, None]).sum(-1)
    return jnp.minimum(jnp.where(zero, 0, scale * jnp.sqrt(jnp.where(zero, 1, square))), limits.max)


def _one_plus_cosine(x: jax.Array, local: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """1 + x_i · x_j of unit rows for this device's i and every j; the results for rows of 0 are not used."""
    product = 1 + products(x, local)
    by_row = jax.checkpoint(lambda row: jnp.square(row[None] + x).sum(-1) / 2)
    return jax.lax.cond((product > 1 / 32).all(), lambda: product, lambda: jax.lax.map(by_row, local(x)))
