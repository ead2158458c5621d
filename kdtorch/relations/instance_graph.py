"""Compares the edges of the graph between samples of student and teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import all_gather_constant
from kdtorch._numerics import custom_op, promote
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.relations._pairs import Pairs, Rows, Squares, blocks, gather, over_pairs, places_of_kept, squares


@checked
def instance_graph_loss(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Edges of the instance relationship graph: mean squared error between squared distances divided by the largest.

    $$\frac1B\sum_j\left(\frac{d_{ij}(s)^2}{\max_{kl}d_{kl}(s)^2}-\frac{d_{ij}(t)^2}{\max_{kl}d_{kl}(t)^2}\right)^2,\qquad d_{ij}(x)=\|x_i-x_j\|$$

    for example i, over every example j of the batch, i included (at distance 0).

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. The gradient also flows through the largest distance. If several
        pairs are equally far apart, it is that of the first pair in row order. If all rows are equal, all edges are 0,
        with gradient 0.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Liu et al., *Knowledge Distillation via Instance Relationship Graph*, CVPR 2019,
    https://doi.org/10.1109/CVPR.2019.00726. This is the edge term; the terms for vertices and for transformations
    between layers are not included. In the authors' Caffe layer the largest distance is a constant. The distances are
    computed by one matrix product. If some pair is so close that this would lose precision, they are computed from the
    differences, a row at a time.

    >>> import torch
    >>> from kdtorch import instance_graph_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> t = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> print(f"{instance_graph_loss(s, t):.4f}")
    0.2178
    """
    rows = gather(student, teacher, where, reduction, group)
    return _loss(rows, where, reduction, group, None if group is None else _farthest_of_all(rows, group))


def _evaluate(pairs: Pairs, farthest: Tensor | None) -> tuple[Tensor, Tensor]:
    s, t = squares(pairs.student, pairs.ours), squares(pairs.teacher, pairs.ours)
    places = torch.stack([_farthest(s)[1], _farthest(t)[1]]) if farthest is None else farthest
    (apart, largest), (_, of_teacher) = (_largest(x, *place) for x, place in zip((s, t), places.tolist(), strict=True))
    value, number = s.rows.new_empty(len(s.square)), len(pairs.student)
    weights, of_largest = 2 / (number * largest) * pairs.weights, s.rows.new_zeros(())
    for block in blocks(len(value), s.rows):
        edges = s.square[block] / largest
        gap = torch.addcdiv(edges, t.square[block], of_teacher, value=-1)
        value[block] = torch.linalg.vecdot(gap, gap) / number
        if pairs.asked:
            s.square[block] = gap.mul_(weights[block, None])
            of_largest -= torch.tensordot(gap, edges)
    if not pairs.asked:
        return value, value.new_empty(0)
    gradient, (i, j) = s.pulled(s.square), places[0].tolist()
    pull = of_largest * apart / s.unit
    gradient[i] += pull
    gradient[j] -= pull
    return value, gradient


def _largest(found: Squares, i: int, j: int) -> tuple[Tensor, Tensor]:
    """The difference of two rows, and its squared length, or infinity if that is 0."""
    apart = found.differences(found.rows[i])[j]
    square = apart.square().sum()
    return apart, torch.where(square == 0, math.inf, square)


def _farthest(found: Squares) -> tuple[Tensor, Tensor]:
    """The largest of this rank's squared distances, and the positions of the first pair that has it."""
    place = found.square.argmax()
    i, j = place // found.square.shape[1], place % found.square.shape[1]
    return found.square.flatten()[place], torch.stack([i + found.ours.start, j])


def _farthest_of_all(rows: Rows, group: ProcessGroup) -> Tensor:
    """For student and teacher, the positions of the first pair that is farthest apart, among all kept rows."""
    largest, places = _of_rank(rows.student.detach(), rows.teacher, rows.kept, rows.ours.start, rows.ours.stop)
    largest, places = all_gather_constant(largest[None], group), all_gather_constant(places[None], group)
    return torch.stack([places[largest[:, side].argmax(), side] for side in range(2)])


@custom_op(
    "(Tensor student, Tensor teacher, Tensor? kept, SymInt start, SymInt stop) -> (Tensor, Tensor)",
    lambda student, teacher, kept, start, stop: (
        promote(student, teacher)[0].new_empty(2),
        student.new_empty(2, 2, dtype=torch.int64),
    ),
)
def _of_rank(student: Tensor, teacher: Tensor, kept: Tensor | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The results of `_farthest` for student and teacher."""
    sides, ours = promote(student, teacher), slice(start, stop)
    if kept is not None:
        sides, ours = tuple(x[kept] for x in sides), places_of_kept(kept, start, stop)
    if ours.stop == ours.start:
        return sides[0].new_full((2,), -1), torch.zeros(2, 2, dtype=torch.int64, device=student.device)
    largest, places = zip(*(_farthest(squares(x, ours)) for x in sides), strict=True)
    return torch.stack(largest), torch.stack(places)


_loss = over_pairs(_evaluate, "Tensor? farthest, ")
