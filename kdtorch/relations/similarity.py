"""Compares the similarities between samples of student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import unit, unit_pull
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.relations._pairs import Pairs, blocks, gather, over_pairs, products, through_products


@checked
def similarity_loss(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Similarity-preserving distillation: mean squared error between two matrices of inner products with unit rows.

    $$\frac1B\sum_j\big(\hat G_{ij}(s)-\hat G_{ij}(t)\big)^2,\qquad \hat G_i=\frac{G_i}{\|G_i\|},\quad G_{ij}(x)=x_i\cdot x_j$$

    for example i, over every example j of the batch, i included.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        group: the process group that the batch is spread over.

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

    >>> import torch
    >>> from kdtorch import similarity_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{similarity_loss(s, t):.4f}")
    0.2929
    """
    return _loss(gather(student, teacher, where, reduction, group), where, reduction, group)


def _evaluate(pairs: Pairs) -> tuple[Tensor, Tensor]:
    (x, largest), (y, _) = _scaled(pairs.student), _scaled(pairs.teacher)
    similarity, other = products(x, pairs.ours), products(y, pairs.ours)
    value, number = x.new_empty(len(similarity)), len(x)
    for block in blocks(len(similarity), x):
        gap = unit(similarity[block]).sub_(unit(other[block]))
        value[block] = torch.linalg.vecdot(gap, gap) / number
        if pairs.asked:
            gap.mul_(2 / number * pairs.weights[block, None])
            similarity[block] = unit_pull(similarity[block], gap)
    gradient = through_products(similarity, x, pairs.ours).div_(largest) if pairs.asked else x.new_empty(0)
    return value, gradient


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x divided by its largest entry, and that entry; x and 1 if x has only zeros (or subnormals)."""
    largest = x.abs().amax()
    largest = torch.where(largest < torch.finfo(x.dtype).tiny, 1, largest)
    return x / largest, largest


_loss = over_pairs(_evaluate)
