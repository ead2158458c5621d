"""Distances between samples, the student's against the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdtorch._collectives import all_gather, all_gather_constant, as_slice, check_batch, local_rows
from kdtorch._numerics import BLOCK, custom_op, promote, unit, with_backward
from kdtorch._reduce import count, reduce, zero_masked
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
    student, teacher = promote(student, teacher)
    student, teacher = (unit(x) for x in zero_masked(where, student, teacher))
    check_batch(student, group)
    local = local_rows(len(student), group)
    student, teacher = all_gather(student, group), all_gather_constant(teacher, group)
    kept = torch.ones_like(student[:, 0], dtype=torch.bool) if where is None else all_gather_constant(where, group)
    return reduce(_squares(student, teacher, kept, local) / count(kept, student.dtype), where, reduction, group)


@custom_op(
    "(Tensor x, Tensor y, Tensor kept, Tensor local) -> (Tensor, Tensor, Tensor)",
    lambda x, y, kept, local: (x.new_empty(local.shape), x.new_empty(*local.shape, x.shape[0]), kept.new_empty(())),
)
def _forward(x: Tensor, y: Tensor, kept: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j (d_ij - e_ij)^2 of this rank's i, d = |x_i - x_j| and e = |y_i - y_j|; 1 - e / d; whether all x are apart."""
    whole, masked, clear = len(local) == len(x), not kept.all(), True
    of_x, of_y = _distances(x), _distances(y)
    value, weight = x.new_zeros(len(local)), x.new_empty(len(local), len(x))
    for here, rows, columns, others in _blocks(local, x):
        masked_pairs = ~(kept[rows, None] & kept[columns]) if masked else None
        distance, apart = of_x(rows, columns, masked_pairs)
        gap = distance - of_y(rows, columns, masked_pairs)[0]
        if masked_pairs is not None:
            gap.masked_fill_(masked_pairs, 0)
        torch.mul(distance.reciprocal_().nan_to_num_(nan=math.nan, posinf=0), gap, out=weight[here, columns])
        value[here] += torch.linalg.vecdot(gap, gap)
        if whole:
            value[others] += torch.linalg.vecdot(gap, gap, dim=0)[others.start - columns.start :]
        clear &= apart
    return value, weight, torch.tensor(clear, device=x.device)


@custom_op(
    "(Tensor cotangent, Tensor value, Tensor weight, Tensor clear, Tensor x, Tensor y, Tensor kept, Tensor local)"
    " -> Tensor",
    lambda cotangent, value, weight, clear, x, *_: torch.empty_like(x),
)
def _backward(
    cotangent: Tensor, value: Tensor, weight: Tensor, clear: Tensor, x: Tensor, y: Tensor, kept: Tensor, local: Tensor
) -> Tensor:
    """2 sum_j (c_i + c_j) (1 - e_ij / d_ij) (x_i - x_j)."""
    whole, twice, result = len(local) == len(x), 2 * cotangent, torch.zeros_like(x)
    if clear:
        x = x - x.mean(0)
    for here, rows, columns, others in _blocks(local, x):
        pull = weight[here, columns] * (twice[here, None] + (twice[columns] if whole else 0))
        result[rows] += _towards(pull, x[rows], x[columns], clear)
        result[others] += _towards(pull[:, others.start - columns.start :].T, x[others], x[rows], clear)
    return result


_squares = with_backward(_forward, _backward)


def _blocks(local: Tensor, x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Of as many rows at once as let a CPU's caches hold their pairs: the places among this rank's rows and among all, of
    what they are compared with, and of what has its pairs with them nowhere else. Where all rows are here, that is each
    pair once.
    """
    first, size = as_slice(local).start, len(x)
    number = max(BLOCK // max(size, 1), 1) if x.device.type == "cpu" else size
    for start in range(0, len(local), number):
        here = slice(start, min(start + number, len(local)))
        rows = slice(first + here.start, first + here.stop)
        if len(local) == size:
            yield here, rows, slice(rows.start, size), slice(rows.stop, size)
        else:
            yield here, rows, slice(0, size), slice(0, size)


def _distances(x: Tensor) -> Callable[[slice, slice, Tensor | None], tuple[Tensor, bool]]:
    """|x_i - x_j| of some i and j, and whether none of them loses its digits in a product of matrices."""
    centered = x - x.mean(0)  # what is common to all rows only costs digits
    length = torch.linalg.vecdot(centered, centered)

    def distances(rows: slice, columns: slice, masked_pairs: Tensor | None) -> tuple[Tensor, bool]:
        square = torch.addmm(length[columns], centered[rows], centered[columns].T, alpha=-2).add_(length[rows, None])
        themselves = square.diagonal(rows.start - columns.start)
        themselves.fill_(math.inf)
        if masked_pairs is not None:
            square.masked_fill_(masked_pairs, math.inf)
        clear = bool(square.amin() * 64 > length.amax())
        if not clear:
            torch.stack([(row - x[columns]).square().sum(-1) for row in x[rows]], out=square)
        themselves.fill_(0)
        return square.clamp_(min=0).sqrt_(), clear

    return distances


def _towards(weight: Tensor, a: Tensor, b: Tensor, clear: bool | Tensor) -> Tensor:
    """sum_j w_ij (a_i - b_j)."""
    if clear or not len(a):
        return weight.sum(1, keepdim=True) * a - weight @ b
    return torch.stack([part @ (row - b) for row, part in zip(a, weight, strict=True)])
