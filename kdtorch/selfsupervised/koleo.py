"""KoLeo: pushes the rows of a batch away from their nearest neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import all_gather, all_gather_constant, check_batch, local_rows
from kdtorch._numerics import BLOCK, coupled, custom_op, promote, unit, unit_pull
from kdtorch._reduce import check_reduction, reduce, reduce_sum, zero_masked
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked

EPSILON = 1e-8


@checked
def koleo_loss(
    student: Float[Tensor, "batch dim"],
    *,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Minus the logarithm of the distance to the nearest neighbour in the batch, which spreads features over the sphere.

    $$-\log\big(\|u_i-u_j+\varepsilon\|+\varepsilon\big),\qquad u_i=\frac{x_i}{\|x_i\|},\quad
    j=\operatorname{argmax}_{k\ne i}u_i\cdot u_k,\quad\varepsilon=10^{-8}$$

    for example i. There is no teacher. The gradient flows to both rows of a pair, but not through the choice of j.

    Args:
        student: `[batch, dim]`, of one view, because two views of an image would be each other's neighbours.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. If several neighbours have the same distance, the first is used.
        With fewer than two kept examples the loss is 0. Equal rows give about 17, with a large, finite gradient; a zero
        row has a cosine of 0 to all others, and no gradient.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Sablayrolles et al., *Spreading Vectors for Similarity Search*, ICLR 2019, https://arxiv.org/abs/1806.03198, as in
    DINOv2, whose code sets the cosine of a row with itself to -1. For two opposite rows, the first is then its own
    neighbour, and the loss is 8.4 instead of -0.69. In this function no row is its own neighbour. Distances are
    computed from differences. The neighbour is found by one matrix product, and if that is not precise enough, by
    differences too.

    >>> import torch
    >>> from kdtorch import koleo_loss
    >>> print(f"{koleo_loss(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])):.4f}")
    -0.6931
    """
    check_reduction(reduction)
    check_batch(student, group)
    local = local_rows(len(student), group)
    kept = None if where is None else all_gather_constant(where, group)
    if group is not None:  # so that gradients are not summed in half precision
        (student,) = promote(student)
    student = all_gather(student, group)
    value = _logarithms(student, kept, local.start, local.stop, summed=reduction != "none")
    if reduction == "none":
        return reduce(value, where, reduction, group)
    return reduce_sum(value, local.stop - local.start, where, reduction, group)


# Written by hand with its gradient, because the values decide which rows are computed separately, and so that nothing
# but the gradient is stored.
@custom_op(
    "(Tensor student, Tensor? kept, SymInt start, SymInt stop, Tensor? weights, bool asked) -> (Tensor, Tensor)",
    lambda student, kept, start, stop, weights, asked: (
        (x := promote(student)[0]).new_empty(stop - start),
        x.new_empty(x.shape if asked else 0),
    ),
)
def _evaluate(
    student: Tensor, kept: Tensor | None, start: int, stop: int, weights: Tensor | None, asked: bool
) -> tuple[Tensor, Tensor]:
    """-log(|u_i - u_j + e| + e) for this rank's i, and the gradient of the weighted sum of these values."""
    (student,) = zero_masked(kept, *promote(student))
    x, rows = unit(student), slice(start, stop)
    every = torch.ones(len(x), dtype=torch.bool, device=x.device) if kept is None else kept
    paired = every[rows] & (every.sum() > 1)
    nearest = _nearest(x, kept, rows)
    equal = (student[rows] == student[nearest]).all(
        -1, keepdim=True
    )  # equal rows may have different unit rows, by rounding
    gap = (x[rows] - x[nearest]).masked_fill_(equal, 0).add_(EPSILON)
    distance = torch.linalg.vector_norm(gap, dim=-1)
    value = torch.where(paired, (distance + EPSILON).log().neg_(), 0)
    gradient = x.new_zeros(x.shape if asked else 0)
    if asked:
        scale = torch.where(paired & (distance != 0), (distance * (distance + EPSILON)).reciprocal_(), 0)
        gap.mul_((scale if weights is None else scale * weights).unsqueeze(-1))
        # the terms of two rows that are each other's nearest are added first, because those of close rows nearly cancel
        back = nearest - start
        here = (back >= 0) & (back < stop - start)
        back = torch.where(here, back, 0)
        place = torch.arange(start, stop, device=x.device)
        mutual = (here & (nearest[back] == place)).unsqueeze(-1)
        gradient[rows] = torch.where(mutual, gap[back], 0) - gap
        gradient.index_add_(0, nearest, gap.masked_fill_(mutual, 0))
        (gradient,) = zero_masked(kept, unit_pull(student, gradient))
    return value, gradient


_logarithms = coupled(_evaluate, learns=1)


def _nearest(x: Tensor, kept: Tensor | None, rows: slice) -> Tensor:
    """The index of the partner with the largest cosine (the first of equal ones) for this rank's rows.

    The cosine is found from 2 - 2 cos = |x_i - x_j|^2, to which a zero row adds 1. If a matrix product cannot decide
    the partner of a row, because it is very close or another is nearly as close, that row is computed separately.
    """
    digits, zero = torch.finfo(x.dtype).eps, (x == 0).all(-1).to(x.dtype)
    centered = x - x.mean(0)  # a part common to all rows would only cost digits
    length = torch.linalg.vecdot(centered, centered) + zero
    masked = None if kept is None else ~kept
    whole = rows.stop - rows.start == len(x)
    # for all rows: the smallest square, its index, and the smallest of the others
    far = torch.full_like(length, math.inf)
    best = far, torch.zeros_like(length, dtype=torch.int64), far.clone()
    number = max(BLOCK // max(len(x), 1), 1) if x.is_cpu else max(len(x), 1)
    for first in range(rows.start, rows.stop, number):
        part = slice(first, min(first + number, rows.stop))
        columns = slice(first if whole else 0, len(x))  # each pair once, if all rows are on this device
        square = torch.addmm(length[columns], centered[part], centered[columns].T, alpha=-2).add_(length[part, None])
        square.diagonal(part.start - columns.start).fill_(math.inf)
        if masked is not None:
            square.masked_fill_(masked[columns] | masked[part, None], math.inf)
        if whole and part.stop < len(x):
            _merge(best, slice(part.stop, len(x)), square[:, part.stop - first :].clone(), 0, first)
        _merge(best, part, square, 1, columns.start)
    least, found, rival = (z[rows] for z in best)
    largest = length.amax() if len(x) else length.new_zeros(())
    is_open = ((rival <= least + 16 * digits * largest) | ~(least * 64 > largest)) & (least != math.inf)
    for i in is_open.nonzero().flatten().tolist():
        place = rows.start + i
        square = (x[place] - x).square().sum(-1) + zero + zero[place]
        square[place] = math.inf
        if masked is not None:
            square.masked_fill_(masked, math.inf)
        found[i] = (square <= square.amin() * (1 + 8 * digits)).int().argmax()
    return found


def _merge(best: tuple[Tensor, Tensor, Tensor], rows: slice, square: Tensor, axis: int, first: int) -> None:
    """Update the best values of some rows with the two smallest squares of a block, which is overwritten."""
    least, place = square.min(axis)
    rival = square.scatter_(axis, place.unsqueeze(axis), math.inf).amin(axis)
    known, found, other = (z[rows] for z in best)
    rival = torch.minimum(torch.maximum(known, least), torch.minimum(other, rival))
    found.copy_(torch.where(least < known, place + first, found))
    known.copy_(torch.minimum(known, least))
    other.copy_(rival)
