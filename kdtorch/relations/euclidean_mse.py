"""Compares the distances between samples of student and teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdtorch._numerics import BLOCK, coupled, custom_op, promote, unit, unit_pull
from kdtorch._reduce import count, reduce, reduce_sum, zero_masked
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.relations._pairs import gather


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

    for example i, over every example j of the batch, i included (at distance 0).

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. Two equal rows have distance 0, with gradient 0. A zero row
        stays at the origin, so its distance to every row that is not zero is 1.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's EU_MSELoss, whose code clamps the squared distance to at least 1e-12. The distances are
    computed by one matrix product. If some pair is so close that this would lose precision, they are computed from the
    differences, a row at a time.

    >>> import torch
    >>> from kdtorch import euclidean_mse_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{euclidean_mse_loss(s, t):.4f}")
    1.0000
    """
    student, teacher, kept, local = gather(student, teacher, where, reduction, group)
    value = _squares(student, teacher, kept, local.start, local.stop, summed=reduction != "none")
    if reduction == "none":
        return reduce(value, where, reduction, group)
    return reduce_sum(value, local.stop - local.start, where, reduction, group)


# Written by hand with its gradient, so that no array is larger than a block of pairs, and each pair is computed only
# once.
@custom_op(
    "(Tensor student, Tensor teacher, Tensor? kept, SymInt start, SymInt stop, Tensor? weights, bool asked)"
    " -> (Tensor, Tensor)",
    lambda student, teacher, kept, start, stop, weights, asked: (
        (x := promote(student, teacher)[0]).new_empty(stop - start),
        x.new_empty(x.shape if asked else 0),
    ),
)
def _evaluate(
    student: Tensor, teacher: Tensor, kept: Tensor | None, start: int, stop: int, weights: Tensor | None, asked: bool
) -> tuple[Tensor, Tensor]:
    """sum_j (d_ij - e_ij)^2 / B for this rank's i, and the gradient of the weighted sum of these values."""
    student, teacher = zero_masked(kept, *promote(student, teacher))
    number = max(len(student), 1) if kept is None else count(kept, student.dtype)
    value, gradient = _over_pairs(unit(student), unit(teacher), kept, start, stop, weights, asked)
    if asked:
        (gradient,) = zero_masked(kept, unit_pull(student, gradient.mul_(2 / number)))
    return value / number, gradient


_squares = coupled(_evaluate, learns=1)


def _over_pairs(
    x: Tensor, y: Tensor, kept: Tensor | None, start: int, stop: int, weights: Tensor | None, asked: bool
) -> tuple[Tensor, Tensor]:
    """sum_j (d_ij - e_ij)^2 for d = |x_i - x_j|, e = |y_i - y_j|; sum_j (c_i + c_j) (1 - e_ij / d_ij) (x_i - x_j)."""
    whole, kept = stop - start == len(x), None if kept is None or kept.all() else kept
    value, gradient = x.new_zeros(stop - start), x.new_zeros(x.shape if asked else 0)
    both, centered = 2 if whole else 1, x - x.mean(0)
    of_x, of_y = _distances(x), _distances(y)
    for here, rows, columns, others in _blocks(start, stop, x):
        masked_pairs = None if kept is None else ~(kept[rows, None] & kept[columns])
        distance, apart = of_x(rows, columns, masked_pairs)
        gap = distance - of_y(rows, columns, masked_pairs)[0]
        if masked_pairs is not None:
            gap.masked_fill_(masked_pairs, 0)
        value[here] += torch.linalg.vecdot(gap, gap)
        if whole:
            value[others] += torch.linalg.vecdot(gap, gap, dim=0)[others.start - columns.start :]
        if not asked:
            continue
        pull = distance.reciprocal_().nan_to_num_(nan=math.nan, posinf=0).mul_(gap)
        pull.mul_(both if weights is None else weights[here, None] + (weights[columns] if whole else 0))
        z = centered if apart else x
        gradient[rows] += _towards(pull, z[rows], z[columns], apart)
        gradient[others] += _towards(pull[:, others.start - columns.start :].T, z[others], z[rows], apart)
    return value, gradient


def _blocks(start: int, stop: int, x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Blocks of rows whose pairs fit into a CPU's caches.

    Each consists of the positions of its rows among this rank's and among all, the positions of the rows that they are
    compared with, and the positions of the rows whose pairs with them occur in no other block. If this rank has all
    rows, each pair occurs once.
    """
    size = len(x)
    number = max(BLOCK // max(size, 1), 1) if x.device.type == "cpu" else size
    for first in range(start, stop, number):
        rows = slice(first, min(first + number, stop))
        here = slice(rows.start - start, rows.stop - start)
        if stop - start == size:
            yield here, rows, slice(rows.start, size), slice(rows.stop, size)
        else:
            yield here, rows, slice(0, size), slice(0, size)


def _distances(x: Tensor) -> Callable[[slice, slice, Tensor | None], tuple[Tensor, bool]]:
    """A function that returns |x_i - x_j| of some i and j, and whether they come from a matrix product without loss."""
    centered = x - x.mean(0)  # a part common to all rows would only cost digits
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


def _towards(weight: Tensor, a: Tensor, b: Tensor, clear: bool) -> Tensor:
    """sum_j w_ij (a_i - b_j)."""
    if clear or not len(a):
        return weight.sum(1, keepdim=True) * a - weight @ b
    return torch.stack([part @ (row - b) for row, part in zip(a, weight, strict=True)])
