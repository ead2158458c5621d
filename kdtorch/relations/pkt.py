"""Compares the conditional probabilities of samples of student and teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._numerics import unit, unit_pull
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.relations._pairs import Pairs, blocks, gather, over_pairs, products, through_products

EPSILON = 1e-7  # part of the published formula: added to the norms, and inside the logarithm


@checked
def pkt_loss(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Probabilistic knowledge transfer: KL divergence between the conditional probabilities of the examples.

    $$\frac1B\sum_jq_{ij}\log\frac{q_{ij}+\varepsilon}{p_{ij}+\varepsilon},\qquad
    p_{ij}=\frac{1+\cos(s_i,s_j)}{\sum_k1+\cos(s_i,s_k)},\quad\cos(x,y)=\frac{x\cdot y}{(\|x\|+\varepsilon)(\|y\|+\varepsilon)}$$

    for example i, over every example j of the batch, i included; q is the same for the teacher, and ε is 1e-7.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        group: the process group that the batch is spread over.

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
    row at a time.

    >>> import torch
    >>> from kdtorch import pkt_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{pkt_loss(s, t):.4f}")
    0.0294
    """
    return _loss(gather(student, teacher, where, reduction, group), where, reduction, group)


def _evaluate(pairs: Pairs) -> tuple[Tensor, Tensor]:
    rows, number = pairs.ours, len(pairs.student)
    s, t = _Cosines(pairs.student, rows), _Cosines(pairs.teacher, rows)
    value = s.unit.new_empty(rows.stop - rows.start)
    for block in blocks(len(value), s.unit):
        p, total = s.probabilities(block)
        q, _ = t.probabilities(block)
        gap = q - p
        error = gap.sum(1)  # 0 except for the rounding of p and q
        p.add_(EPSILON)
        value[block] = (torch.linalg.vecdot(q, gap.div_(p).log1p_()) - error) / number
        if pairs.asked:
            h = q.div_(p)
            h.sub_(1 - EPSILON * h.sum(1, keepdim=True))  # its mean under p is 0
            t.above[block] = h.mul_(-pairs.weights[block, None] / (number * total))
    return value, s.pulled(t.above) if pairs.asked else value.new_empty(0)


class _Cosines:
    """1 + cos of this rank's rows with all rows, computed from 1 + cos of the unit rows, without cancellation."""

    def __init__(self, x: Tensor, rows: slice) -> None:
        self.x, self.rows, self.unit = x, rows, unit(x)
        self.length = _length(x)
        self.share, self.rest = self.length / (self.length + EPSILON), EPSILON / (self.length + EPSILON)
        self.above = products(self.unit, rows).add_(1)
        self.clear = bool(self.above.amin() > 1 / 32)
        if not self.clear:
            for i, row in enumerate(self.unit[rows]):
                self.above[i] = (row + self.unit).square().sum(-1) / 2

    def probabilities(self, block: slice) -> tuple[Tensor, Tensor]:
        """The probabilities of all rows, given each row of a block of this rank's rows; and their normalisers."""
        similarity = torch.addcmul(self.rest, self.above[block], self.share)
        similarity.mul_(self.share[self.rows][block, None]).add_(self.rest[self.rows][block, None])
        total = similarity.sum(1, keepdim=True)
        return similarity.div_(total), total

    def pulled(self, weight: Tensor) -> Tensor:
        """The gradient with respect to x, given the gradient with respect to 1 + cos."""
        rows, share = self.rows, self.share
        if self.clear:
            x = share[:, None] * self.unit
            of_x = through_products(weight, x, rows)
            of_unit, of_share = share[:, None] * of_x, torch.linalg.vecdot(self.unit, of_x)
        else:
            weighted = weight * (self.above - 1)
            of_share = weighted.T @ share[rows]
            of_share[rows] += weighted @ share
            of_unit = torch.zeros_like(self.unit)
            shares = weight.mul_(share).mul_(share[rows, None])
            for i, part in zip(range(rows.start, rows.stop), shares, strict=True):
                both = self.unit[i] + self.unit
                of_unit[i] += part @ both
                of_unit.addcmul_(part[:, None], both)
        of_length = of_share * self.rest / (self.length + EPSILON)
        return unit_pull(self.x, of_unit).add_(of_length[:, None] * self.unit)


def _length(x: Tensor) -> Tensor:
    """|x|, the length of each row."""
    limits = torch.finfo(x.dtype)
    scale = x.abs().amax(-1)
    zero = scale < limits.tiny
    length = scale * torch.linalg.vector_norm(x / torch.where(zero, math.inf, scale)[:, None], dim=-1)
    return torch.where(zero, 0, length.clamp(max=limits.max))


_loss = over_pairs(_evaluate)
