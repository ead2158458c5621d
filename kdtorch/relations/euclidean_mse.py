"""Distances between samples, the student's against the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import opaque, pulled_back, unit, widen
from kdtorch._reduce import count, keep, reduce
from kdtorch._typing import Bool, Float, Reduction, checked


@checked
def euclidean_mse_loss(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared error between the two matrices of Euclidean distances of unit-normalised features.

    $$\frac1B\sum_j\big(d_{ij}(s)-d_{ij}(t)\big)^2,\qquad d_{ij}(x)=\left\|\frac{x_i}{\|x_i\|}-\frac{x_j}{\|x_j\|}\right\|$$

    for sample i, over every sample j of the batch, i among them (whose distance is 0).

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant, its gradient is 0.
        where: `[batch]`, False for examples that count for nothing, neither as i nor as j.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"` for `[batch]`, the mean over partners of each.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. Two equal rows are 0 apart and pull at nothing; a zero row
        stays at the origin, 1 from every other.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's EU_MSELoss, whose code clamps the squared distance at 1e-12 instead. Distances come from
    one product of matrices; where some pair is so close that this would lose its digits, from the differences
    themselves, a row at a time.

    >>> import torch
    >>> from kdtorch import euclidean_mse_loss
    >>> s, t = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{euclidean_mse_loss(s, t):.4f}")
    1.0000
    """
    student, teacher = widen(student, teacher)
    student, teacher = (unit(x) for x in keep(where, student, teacher))
    kept = torch.ones_like(student[:, 0], dtype=torch.bool) if where is None else where
    partners = kept[:, None] & kept[None] & ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    gap = _distances(student, partners) - _distances(teacher.detach(), partners)
    pairs = torch.where(partners, gap.square(), 0)
    return reduce(pairs.sum(1) / count(kept, student.dtype), where, reduction)


@opaque("(Tensor x, Tensor partners) -> Tensor", lambda x, partners: x.new_empty(partners.shape))
def _forward(x: Tensor, partners: Tensor) -> Tensor:
    """|x_i - x_j| of partners, 0 elsewhere, in [batch, batch]."""
    square, clear = _squares(x, partners)
    if not clear:
        square = torch.stack([(row - x).square().sum(-1) for row in x])
    return torch.where(partners & ~(square <= 0), square, 0).sqrt()


@opaque("(Tensor cotangent, Tensor x, Tensor partners) -> Tensor", lambda cotangent, x, partners: torch.empty_like(x))
def _backward(cotangent: Tensor, x: Tensor, partners: Tensor) -> Tensor:
    """sum_j (c_ij + c_ji) (x_i - x_j) / d_ij"""
    cotangent = torch.where(partners, cotangent + cotangent.T, 0)
    square, clear = _squares(x, partners)
    if clear:
        weight = cotangent / torch.where(partners, square, 1).sqrt()
        centered = x - x.mean(0)
        return weight.sum(1, keepdim=True) * centered - weight @ centered
    rows = []
    for row, weight in zip(x, cotangent, strict=True):
        difference = row - x
        length = difference.square().sum(-1).sqrt()
        rows.append(torch.where(length == 0, 0, weight / length) @ difference)
    return torch.stack(rows)


_distances = pulled_back(_forward, _backward)


def _squares(x: Tensor, partners: Tensor) -> tuple[Tensor, bool]:
    """Squared distances from one product of matrices, and whether none of them loses its digits so."""
    centered = x - x.mean(0)  # what is common to all rows only costs digits
    length = centered.square().sum(-1)
    square = length[:, None] + length[None] - 2 * centered @ centered.T
    return square, bool((~partners | (square * 64 > length.amax())).all())
