"""What losses over pairs of samples share: the rows of all ranks, their products and their squared distances."""

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
        kept: `[whole batch]`; None: all are.
        ours: the places of this rank's.
    """

    student: Tensor
    teacher: Tensor
    kept: Tensor | None
    ours: slice


def gather(
    student: Tensor, teacher: Tensor, where: Tensor | None, reduction: Reduction, group: ProcessGroup | None
) -> Rows:
    """The rows, of which the student's have a gradient, once the arguments are checked."""
    check_reduction(reduction)
    check_batch(student, group)
    kept = None if where is None else all_gather_constant(where, group)
    ours = local_rows(len(student), group)
    if group is not None:  # gradients are summed over ranks, and not in half precision
        student, teacher = promote(student, teacher)
    return Rows(all_gather(student, group), all_gather_constant(teacher, group), kept, ours)


class Pairs(NamedTuple):
    """The rows of all ranks that are kept, in the dtype that the loss is computed in.

    Attributes:
        student: `[kept examples, student_dim]`.
        teacher: `[kept examples, teacher_dim]`.
        ours: the places of this rank's.
        weights: of their values, in the sum that the gradient is of.
        asked: whether the gradient is asked for.
    """

    student: Tensor
    teacher: Tensor
    ours: slice
    weights: Tensor
    asked: bool


def over_pairs(way: Callable[..., tuple[Tensor, Tensor]], settings: str = "") -> Callable[..., Tensor]:
    """A loss, of (rows, where, reduction, group, *settings), from what it is on rows that are all kept.

    `way(pairs, *settings)` returns the value of each of this rank's rows, and the gradient of their weighted sum with
    respect to all of the student's rows. So the gradient is written by hand, and nothing is held of all pairs until the
    backward pass. `settings` names them with their types, for the operator.
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
    """Of this rank's kept rows among all kept rows."""
    first = int(kept[:start].sum())
    return slice(first, first + int(kept[start:stop].sum()))


def _shapes(student: Tensor, teacher: Tensor, kept: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    start, stop, _, asked = others[-4:]
    x = promote(student, teacher)[0]
    return x.new_empty(stop - start), x.new_empty(x.shape if asked else 0)


def blocks(number: int, x: Tensor) -> Iterator[slice]:
    """Of as many of `number` rows at once as let a CPU's caches hold their pairs with the rows of x."""
    step = max(BLOCK // max(len(x), 1), 1) if x.device.type == "cpu" else max(number, 1)
    for first in range(0, number, step):
        yield slice(first, min(first + step, number))


def products(x: Tensor, ours: slice) -> Tensor:
    """x_i · x_j of this rank's i and every j. Where all rows are here, each is computed once."""
    if ours.stop - ours.start < len(x):
        return x[ours] @ x.T
    result = x.new_empty(len(x), len(x))
    for block in blocks(len(x), x):
        torch.mm(x[block], x[block.start :].T, out=result[block, block.start :])
        result[block.stop :, block] = result[block, block.stop :].T
    return result


def through_products(weight: Tensor, x: Tensor, ours: slice) -> Tensor:
    """The gradient with respect to x, given that with respect to `products`."""
    if ours.stop - ours.start == len(x):
        return (weight + weight.T) @ x
    gradient = weight.T @ x[ours]
    gradient[ours] += weight @ x
    return gradient


class Squares(NamedTuple):
    """Squared distances, scaled by a unit.

    Attributes:
        square: |x_i - x_j|² / unit² of this rank's i and every j.
        clear: whether none of them lost its digits in a product of matrices, so that they come from one.
        rows: all rows.
        unit: a power of 2 of about the largest difference of two entries, or infinity where all rows are equal.
        ours: the places of this rank's rows.
    """

    square: Tensor
    clear: bool
    rows: Tensor
    unit: Tensor
    ours: slice

    def differences(self, row: Tensor) -> Tensor:
        """(row - x_j) / unit of every j."""
        return (row - self.rows) / self.unit

    def pulled(self, weight: Tensor) -> Tensor:
        """The gradient with respect to the rows that were given, given that with respect to the squares."""
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
    """Squared distances of the rows of x; from the differences, one row at a time, if a product would lose digits."""
    x = x / 2  # so that no difference is too large
    z = x - x[:1]
    largest = z.abs().amax()
    unit = torch.where(
        largest < torch.finfo(x.dtype).tiny, math.inf, largest / torch.frexp(largest)[0]
    )  # so that ties stay ties
    z.div_(unit)  # a part that all rows share only costs digits
    length = torch.linalg.vecdot(z, z)
    square = products(z, ours).mul_(-2).add_(length).add_(length[ours, None])
    themselves = square.diagonal(ours.start)
    themselves.fill_(math.inf)
    clear = bool(square.amin() * 64 > length.amax())
    if not clear:
        torch.stack([((row - x) / unit).square().sum(-1) for row in x[ours]], out=square)
    themselves.fill_(0)
    return Squares(square, clear, x, unit, ours)
