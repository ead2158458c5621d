"""Distances between samples, the student's against the teacher's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import as_slice, check_batch, gather, own, replicate
from kdtorch._numerics import opaque, pulled_back, unit, widen
from kdtorch._reduce import count, keep, reduce
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked


@checked
def euclidean_mse_loss(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Mean squared error between the two matrices of Euclidean distances of unit-normalised features.

    $$\frac1B\sum_j\big(d_{ij}(s)-d_{ij}(t)\big)^2,\qquad d_{ij}(x)=\left\|\frac{x_i}{\|x_i\|}-\frac{x_j}{\|x_j\|}\right\|$$

    for sample i, over every sample j of the batch, i among them (whose distance is 0).

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant, its gradient is 0.
        where: `[batch]`, False for examples that count for nothing, neither as i nor as j.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"` for `[batch]`, the mean over partners of each.
        group: the process group that the batch is spread over; the mean over ranks of what they return, and of their
            gradients, is then that of the whole batch.

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
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{euclidean_mse_loss(s, t):.4f}")
    1.0000
    """
    student, teacher = widen(student, teacher)
    student, teacher = (unit(x) for x in keep(where, student, teacher))
    check_batch(student, group)
    mine = own(len(student), group)
    student, teacher = gather(student, group), replicate(teacher, group)
    kept = torch.ones_like(student[:, 0], dtype=torch.bool) if where is None else replicate(where, group)
    gap = _distances(student, kept, mine) - _distances(teacher, kept, mine)
    return reduce(gap.square().sum(1) / count(kept, student.dtype), where, reduction, group)


@opaque("(Tensor x, Tensor kept, Tensor mine) -> Tensor", lambda x, kept, mine: x.new_empty(len(mine), len(x)))
def _forward(x: Tensor, kept: Tensor, mine: Tensor) -> Tensor:
    """|x_i - x_j| for this rank's i and every j, 0 where one of them is masked."""
    rows = as_slice(mine)
    centered = x - x.mean(0)  # what is common to all rows only costs digits
    length = centered.square().sum(-1)
    square = torch.addmm(length, centered[rows], centered.T, alpha=-2).add_(length[rows, None])
    if not _clear(square, length, kept, rows):
        torch.stack([(row - x).square().sum(-1) for row in x[rows]], out=square)
    square.diagonal(rows.start).fill_(0)
    return _without_masked(square, kept, rows).clamp_(min=0).sqrt_()


@opaque(
    "(Tensor cotangent, Tensor distance, Tensor x, Tensor kept, Tensor mine) -> Tensor",
    lambda cotangent, distance, x, kept, mine: torch.empty_like(x),
)
def _backward(cotangent: Tensor, distance: Tensor, x: Tensor, kept: Tensor, mine: Tensor) -> Tensor:
    """sum_j (c_ij + c_ji) (x_i - x_j) / d_ij, 0 where d_ij is."""
    rows = as_slice(mine)
    if len(mine) == len(x):  # every pair is here twice
        cotangent = cotangent + cotangent.T
    weight = _without_masked(distance.reciprocal().nan_to_num_(nan=math.nan, posinf=0).mul_(cotangent), kept, rows)
    centered = x - x.mean(0)
    clear = _clear(distance.square(), centered.square().sum(-1), kept, rows)
    if clear:
        towards = weight.sum(1, keepdim=True) * centered[rows] - weight @ centered
    else:
        towards = torch.stack([part @ (row - x) for row, part in zip(x[rows], weight, strict=True)])
    if len(mine) == len(x):
        return towards
    if clear:
        result = weight.sum(0)[:, None] * centered - weight.T @ centered[rows]
    else:
        result = torch.stack([part @ (row - x[rows]) for row, part in zip(x, weight.T, strict=True)])
    result[rows] += towards
    return result


_distances = pulled_back(_forward, _backward)


def _clear(square: Tensor, length: Tensor, kept: Tensor, rows: slice) -> bool:
    """Whether no squared distance loses its digits in a product of matrices. The diagonal is put out of the way."""
    if not square.numel():
        return True
    square.diagonal(rows.start).fill_(math.inf)
    smallest = (square if kept.all() else torch.where(kept[rows, None] & kept, square, math.inf)).amin()
    return bool(smallest * 64 > length.amax())


def _without_masked(pairs: Tensor, kept: Tensor, rows: slice) -> Tensor:
    """0 for pairs with a masked row, of which there are none as a rule."""
    return pairs if kept.all() else torch.where(kept[rows, None] & kept, pairs, 0)
