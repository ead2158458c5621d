"""MiniLMv2: relations between the tokens of a sequence, as in self-attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kdjax._numerics import HIGHEST, dot, kl_and_gradient, softmax
from kdjax._reduce import reduce, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdlosses.settings import common_divisor


@checked
def minilm_loss(
    student: Float[Array, "batch positions student_dim"],
    teacher: Float[Array, "batch positions teacher_dim"],
    *,
    relation_heads: int,
    where: Bool[Array, "batch positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""MiniLMv2: the relations between tokens by the student's queries, keys or values should match the teacher's.

    $$\frac1{HN}\sum_{h,i}\mathrm{KL}(Q_{hi}\,\|\,P_{hi}),\qquad
    P_h=\mathrm{softmax}\Big(\frac{X_hX_h^\top}{\sqrt{d/H}}\Big)$$

    for a sequence of N kept tokens, with H relation heads: X_h is the h-th part of the columns of the student's array
    of width d, and P_hi is row i of the softmax over the kept tokens. Q is the same for the teacher, with its own
    width.

    Args:
        student: `[batch, positions, student_dim]`, the queries, keys or values of one layer, with the attention heads
            side by side.
        teacher: `[batch, positions, teacher_dim]`, the same for a layer of the teacher, of any width; constant.
        relation_heads: H, the number of parts that both widths are divided into. It need not be the number of attention
            heads, but it must divide both widths.
        where: `[batch, positions]`, False for tokens that are left out, or for whole sequences.
        reduction: `"mean"` over the sequences that have a kept token, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. It is 0 where the relations agree and never negative. A sequence
        with one kept token has the value 0.

    Raises:
        ValueError: `relation_heads` that do not divide both widths, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    One call computes one relation; the paper adds those of queries, keys and values. One head is computed at a time.

    Wang, Bao, Huang, Dong, Wei, *MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers*, Findings of ACL 2021, https://arxiv.org/abs/2012.15828. The mean is taken for each sequence first, so
    long and short sequences have the same weight.

    >>> import jax.numpy as jnp
    >>> from kdjax import minilm_loss
    >>> s = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> t = [[2.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    >>> print(f"{minilm_loss(s, jnp.array([t]), relation_heads=2):.4f}")
    0.0889
    """
    relation_heads = common_divisor("relation_heads", relation_heads, student.shape[-1], teacher.shape[-1])
    parts = ((*x.shape[:2], relation_heads, x.shape[2] // relation_heads) for x in (student, teacher))
    student, teacher = (jnp.reshape(x, shape) for x, shape in zip((student, teacher), parts, strict=True))
    kept = None if where is None else where.any(-1)
    return reduce(_relations(student, teacher, where, where=kept), kept, reduction, axis_name)


def relations_and_gradient(x: jax.Array, y: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The mean of KL(Q || P) over the kept tokens of a sequence and over its heads, which are the axis before the last.

    It is computed for one head at a time, together with its gradient (G + Gᵀ) x / sqrt(d), where G is P - Q divided by
    the number of rows, so that no array is larger than the products of one head.
    """
    kept = jnp.ones(x.shape[:-2], bool) if where is None else jnp.asarray(where)
    x, y = zero_masked(kept, x, y)
    columns = kept | ~kept.any(-1, keepdims=True)  # an empty sequence uses all columns
    number = jnp.maximum(kept.sum(-1, dtype=x.dtype), 1) * x.shape[-2]

    def head(both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = both
        logits = _products(y, columns)
        value, slope = kl_and_gradient(_products(x, columns), logits, 1.0)
        value = value / number[..., None]
        # if a row's value overflows, its part of the mean may not; then the terms of log P are divided before the sum
        value = jax.lax.cond(
            jnp.isinf(value).any(),
            lambda: jnp.where(
                jnp.isinf(value), dot(softmax(logits).p, -_products(jax.lax.stop_gradient(x), columns, number)), value
            ),
            lambda: value,
        )
        value, slope = zero_masked(kept, value, slope)
        pulled = jnp.matmul(slope + slope.swapaxes(-1, -2), x, precision=HIGHEST) / math.sqrt(x.shape[-1])
        return value.sum(-1), pulled

    values, gradients = jax.lax.map(head, (jnp.moveaxis(x, -2, 0), jnp.moveaxis(y, -2, 0)))
    return values.sum(0), jnp.moveaxis(gradients, 0, -2) / number[..., None, None, None]


def _products(x: jax.Array, columns: jax.Array, number: jax.Array | None = None) -> jax.Array:
    """x xᵀ / sqrt(d) minus the largest of each row, divided by a number for each sequence; -inf outside the columns.

    Rows of large numbers are divided by their largest entry first, so that only products that are far below the row's
    largest one can overflow, to -inf.
    """
    scale = jax.lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True, initial=1))
    product = jnp.matmul(x / scale, x.swapaxes(-1, -2), precision=HIGHEST)
    product = jnp.where(columns[..., None, :], product, -jnp.inf)
    below = product - jax.lax.stop_gradient(product.max(-1, keepdims=True, initial=-jnp.inf))
    factor = scale / math.sqrt(x.shape[-1])
    return below * (factor if number is None else factor / number[..., None, None])


_relations = rowwise(relations_and_gradient)
