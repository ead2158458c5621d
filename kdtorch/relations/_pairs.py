"""Shared by the losses over pairs of samples: the rows of all ranks, their products and their squared distances."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdtorch._collectives import all_gather, all_gather_constant, check_batch, local_rows
from kdtorch._numerics import BLOCK, coupled, custom_op, promote
from kdtorch._reduce import check_reduction, reduce, reduce_sum
from kdtorch._typing import ProcessGroup, Reduction


class Rows(NamedTuple):
    """The rows of all ranks.

    Attributes:
        student: `[whole batch, student_dim]`.
        teacher: `[whole batch, teacher_dim]`, constant.
        kept: `[whole batch]`, or None if all are kept.
        ours: the positions of this rank's rows.
    """

    student: Tensor
    teacher: Tensor
    kept: Tensor | None
    ours: slice


def gather(
    student: Tensor, teacher: Tensor, where: Tensor | None, reduction: Reduction, group: ProcessGroup | None
) -> Rows:
    """Check the arguments, and gather the rows; only the student's have a gradient."""
    check_reduction(reduction)
    check_batch(student, group)
    kept = None if where is None else all_gather_constant(where, group)
    ours = local_rows(len(student), group)
    if group is not None:  # so that gradients are not summed in half precision
        student, teacher = promote(student, teacher)
    return Rows(all_gather(student, group), all_gather_constant(teacher, group), kept, ours)


class Pairs(NamedTuple):
    """The kept rows of all ranks, in the dtype in which the loss is computed.

    Attributes:
        student: `[kept examples, student_dim]`.
        teacher: `[kept examples, teacher_dim]`.
        ours: the positions of this rank's rows.
        weights: the weights of their values in the sum whose gradient is computed.
        asked: whether the gradient is needed.
    """

    student: Tensor
    teacher: Tensor
    ours: slice
    weights: Tensor
    asked: bool


def over_pairs(way: Callable[..., tuple[Tensor, Tensor]], settings: str = "") -> Callable[..., Tensor]:
    """Make a loss of (rows, where, reduction, group, *settings) from one of rows that are all kept.

    `way(pairs, *settings)` returns the value of each of this rank's rows, and the gradient of their weighted sum with
    respect to all rows of the student. The gradient is written by hand, so that no array of all pairs is stored until
    the backward pass. The argument `settings` has the names and types of the settings in the schema of an operator.
    """

    @custom_op(
        f"(Tensor student, Tensor teacher, Tensor? kept, {settings}SymInt start, SymInt stop, Tensor? weights, bool asked)"
        " -> (Tensor, Tensor)",
        _shapes,
    )
    @functools.wraps(way)
    def evaluate(student: Tensor, teacher: Tensor, kept: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        *given, start, stop, weights, asked = others
        x, y = promote(student, teacher)
        weights = x.new_ones(stop - start) if weights is None else weights
        value, gradient = x.new_zeros(stop - start), x.new_zeros(x.shape if asked else 0)
        if kept is None or bool(kept.all()):
            return way(Pairs(x, y, slice(start, stop), weights, asked), *given) if stop > start else (value, gradient)
        places = places_of_kept(kept, start, stop)
        if places.stop > places.start:
            mask = kept[start:stop]
            value[mask], of_kept = way(Pairs(x[kept], y[kept], places, weights[mask], asked), *given)
            if asked:
                gradient[kept] = of_kept
        return value, gradient

    values = coupled(evaluate, learns=1)

    def loss(
        rows: Rows, where: Tensor | None, reduction: Reduction, group: ProcessGroup | None, *settings: Any
    ) -> Tensor:
        student, teacher, kept, ours = rows
        value = values(student, teacher, kept, *settings, ours.start, ours.stop, summed=reduction != "none")
        if reduction == "none":
            return reduce(value, where, reduction, group)
        return reduce_sum(value, ours.stop - ours.start, where, reduction, group)

    return loss


def places_of_kept(kept: Tensor, start: int, stop: int) -> slice:
    """The positions of this rank's kept rows among all kept rows."""
    first = int(kept[:start].sum())
    return slice(first, first + int(kept[start:stop].sum()))


def _shapes(student: Tensor, teacher: Tensor, kept: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    start, stop, _, asked = others[-4:]
    x = promote(student, teacher)[0]
    return x.new_empty(stop - start), x.new_empty(x.shape if asked else 0)


def blocks(number: int, x: Tensor) -> Iterator[slice]:
    """Slices of `number` rows, such that a CPU's caches hold the pairs of a block with all rows of x."""
    step = max(BLOCK // max(len(x), 1), 1) if x.device.type == "cpu" else max(number, 1)
    for first in range(0, number, step):
        yield slice(first, min(first + step, number))


def products(x: Tensor, ours: slice) -> Tensor:
    """x_i · x_j for this rank's i and every j. If this rank has all rows, each pair is computed once."""
    if ours.stop - ours.start < len(x):
        return x[ours] @ x.T
    result = x.new_empty(len(x), len(x))
    for block in blocks(len(x), x):
        torch.mm(x[block], x[block.start :].T, out=result[block, block.start :])
        result[block.stop :, block] = result[block, block.stop :].T
    return result


def through_products(weight: Tensor, x: Tensor, ours: slice) -> Tensor:
    """The gradient with respect to x, given the gradient with respect to `products`."""
    if ours.stop - ours.start == len(x):
        return (weight + weight.T) @ x
    gradient = weight.T @ x[ours]
    gradient[ours] += weight @ x
    return gradient


class Squares(NamedTuple):
    """Squared distances, scaled by a unit.

    Attributes:
        square: |x_i - x_j|² / unit² for this rank's i and every j.
        clear: whether the squares come from a matrix product, because none of them loses its digits there.
        rows: all rows.
        unit: a power of 2 near the largest difference of two entries, or infinity if all rows are equal.
        ours: the positions of this rank's rows.
    """

    square: Tensor
    clear: bool
    rows: Tensor
    unit: Tensor
    ours: slice

    def differences(self, row: Tensor) -> Tensor:
        """(row - x_j) / unit for every j."""
        return (row - self.rows) / self.unit

    def pulled(self, weight: Tensor) -> Tensor:
        """The gradient with respect to the original rows, given the gradient with respect to the squares."""
        if self.clear:
            z = (self.rows - self.rows[:1]) / self.unit
            gradient = weight.sum(0)[:, None] * z
            gradient[self.ours] += weight.sum(1)[:, None] * z[self.ours]
            return gradient.sub_(through_products(weight, z, self.ours)).div_(self.unit)
        gradient = torch.zeros_like(self.rows)
        for i, part in zip(range(self.ours.start, self.ours.stop), weight, strict=True):
            apart = self.differences(self.rows[i])
            gradient[i] += part @ apart
            gradient.addcmul_(apart, part[:, None], value=-1)
        return gradient.div_(self.unit)


def squares(x: Tensor, ours: slice) -> Squares:
    """Squared distances of the rows of x; one row at a time from the differences, if a matrix product loses digits."""
    x = x / 2  # so that no difference overflows
    z = x - x[:1]
    largest = z.abs().amax()
    unit = torch.where(
        largest < torch.finfo(x.dtype).tiny, math.inf, largest / torch.frexp(largest)[0]
    )  # a power of 2, so that ties stay ties
    z.div_(unit)  # a part common to all rows would only cost digits
    length = torch.linalg.vecdot(z, z)
    square = products(z, ours).mul_(-2).add_(length).add_(length[ours, None])
    themselves = square.diagonal(ours.start)
    themselves.fill_(math.inf)
    clear = bool(square.amin() * 64 > length.amax())
    if not clear:
        torch.stack([((row - x) / unit).square().sum(-1) for row in x[ours]], out=square)
    themselves.fill_(0)
    return Squares(square, clear, x, unit, ours)
