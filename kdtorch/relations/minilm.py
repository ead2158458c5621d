"""MiniLMv2: relations between the tokens of a sequence, as in self-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdlosses.settings import common_divisor
from kdtorch._numerics import dot, eager_on_cpu, kl_and_gradient, softmax
from kdtorch._reduce import reduce, zero_masked
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked


@checked
def minilm_loss(
    student: Float[Tensor, "batch positions student_dim"],
    teacher: Float[Tensor, "batch positions teacher_dim"],
    *,
    relation_heads: int,
    where: Bool[Tensor, "batch positions"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
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
        group: the process group that the batch is spread over.

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

    >>> import torch
    >>> from kdtorch import minilm_loss
    >>> s = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> t = [[2.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    >>> print(f"{minilm_loss(s, torch.tensor([t]), relation_heads=2):.4f}")
    0.0889
    """
    relation_heads = common_divisor("relation_heads", relation_heads, student.shape[-1], teacher.shape[-1])
    student, teacher = (x.unflatten(-1, (relation_heads, x.shape[-1] // relation_heads)) for x in (student, teacher))
    kept = None if where is None else where.any(-1)
    return reduce(_relations(student, teacher, where, where=kept), kept, reduction, group)


def relations_and_gradient(x: Tensor, y: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of KL(Q || P) over the kept tokens of a sequence and over its heads, which are the axis before the last.

    It is computed for one head at a time, together with its gradient (G + Gᵀ) x / sqrt(d), where G is P - Q divided by
    the number of rows, so that no array is larger than the products of one head.
    """
    kept = x.new_ones(x.shape[:-2], dtype=torch.bool) if where is None else where
    x, y = zero_masked(where, x, y)
    columns = None if where is None else where | ~where.any(-1, keepdim=True)  # an empty sequence uses all columns
    number = kept.sum(-1, dtype=x.dtype).clamp(min=1) * x.shape[-2]

    def head(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = _products(y, columns)
        value, slope = kl_and_gradient(_products(x, columns), logits, 1.0)
        value = value / number[..., None]
        # if a row's value overflows, its part of the mean may not; then the terms of log P are divided before the sum
        if not eager_on_cpu(x, y) or value.isinf().any():
            value = torch.where(value.isinf(), dot(softmax(logits).p, -_products(x.detach(), columns, number)), value)
        value, slope = zero_masked(where, value, slope)
        pulled = (slope + slope.mT) @ x / math.sqrt(x.shape[-1])
        return value.sum(-1), pulled

    values, gradients = zip(*map(head, x.unbind(-2), y.unbind(-2)), strict=True)
    return torch.stack(values).sum(0), torch.stack(gradients, -2) / number[..., None, None, None]


def _products(x: Tensor, columns: Tensor | None, number: Tensor | None = None) -> Tensor:
    """x xᵀ / sqrt(d) minus the largest of each row, divided by a number for each sequence; -inf outside the columns.

    Rows of large numbers are divided by their largest entry first, so that only products that are far below the row's
    largest one can overflow, to -inf.
    """
    if not x.numel():
        return x @ x.mT
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1)
    product = (x / scale) @ x.mT
    if columns is not None:
        product = torch.where(columns[..., None, :], product, -math.inf)
    below = product - product.detach().amax(-1, keepdim=True)
    factor = scale / math.sqrt(x.shape[-1])
    return below * (factor if number is None else factor / number[..., None, None])


_relations = rowwise(relations_and_gradient, axes=3)
