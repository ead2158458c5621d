"""Distances between samples, the student's against the teacher's."""

from __future__ import annotations

import math

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
    gap = _distances(student, kept) - _distances(teacher.detach(), kept)
    return reduce(gap.square().sum(1) / count(kept, student.dtype), where, reduction)


@opaque("(Tensor x, Tensor kept) -> Tensor", lambda x, kept: x.new_empty(len(x), len(x)))
def _forward(x: Tensor, kept: Tensor) -> Tensor:
    """|x_i - x_j| in `[batch, batch]`, 0 where one of them is masked."""
    centered = x - x.mean(0)  # what is common to all rows only costs digits
    length = centered.square().sum(-1)
    square = torch.addmm(length, centered, centered.T, alpha=-2).add_(length[:, None])
    if not _clear(square, length, kept):
        torch.stack([(row - x).square().sum(-1) for row in x], out=square)
    square.fill_diagonal_(0)
    return _without_masked(square, kept).clamp_(min=0).sqrt_()


@opaque(
    "(Tensor cotangent, Tensor distance, Tensor x, Tensor kept) -> Tensor",
    lambda cotangent, distance, x, kept: torch.empty_like(x),
)
def _backward(cotangent: Tensor, distance: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """sum_j (c_ij + c_ji) (x_i - x_j) / d_ij, 0 where d_ij is."""
    near = distance.reciprocal().nan_to_num_(nan=math.nan, posinf=0)
    weight = _without_masked(near.mul_(cotangent + cotangent.T), kept)
    centered = x - x.mean(0)
    if _clear(distance.square(), centered.square().sum(-1), kept):
        return weight.sum(1, keepdim=True) * centered - weight @ centered
    return torch.stack([part @ (row - x) for row, part in zip(x, weight, strict=True)])


_distances = pulled_back(_forward, _backward)


def _clear(square: Tensor, length: Tensor, kept: Tensor) -> bool:
    """Whether no squared distance loses its digits in a product of matrices. The diagonal is put out of the way."""
    square.fill_diagonal_(math.inf)
    smallest = (square if kept.all() else torch.where(kept[:, None] & kept, square, math.inf)).amin()
    return bool(smallest * 64 > length.amax())


def _without_masked(pairs: Tensor, kept: Tensor) -> Tensor:
    """0 for pairs with a masked row, of which there are none as a rule."""
    return pairs if kept.all() else torch.where(kept[:, None] & kept, pairs, 0)
