"""Compares the distances and angles between samples of student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import non_negative, scalar, unit, unit_pull
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked
from kdtorch.relations._pairs import Pairs, Squares, blocks, gather, over_pairs, squares


@checked
def rkd_loss(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    distance_weight: Scalar = 25.0,
    angle_weight: Scalar = 50.0,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Relational knowledge distillation: the distances of pairs, and the angles of triples, should match the teacher's.

    $$\frac{w_d}B\sum_jH\left(\frac{d_{ij}(s)}{\mu(s)}-\frac{d_{ij}(t)}{\mu(t)}\right)
    +\frac{w_a}{B^2}\sum_{jk}H\big(\cos_{ijk}(s)-\cos_{ijk}(t)\big)$$

    $$d_{ij}(x)=\|x_i-x_j\|,\qquad \cos_{ijk}(x)=\frac{(x_j-x_i)\cdot(x_k-x_i)}{d_{ij}(x)\,d_{ik}(x)}$$

    for example i, over every j and k of the batch. μ is the mean distance of different examples, and H the Huber
    function, x²/2 up to 1 and |x| − ½ beyond.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        distance_weight: w_d ≥ 0, of the distances.
        angle_weight: w_a ≥ 0, of the angles.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. Two equal rows have distance 0, and a cosine of 0 with every
        other side, with gradient 0. They count in the mean distance, through which the gradient flows too. For a single
        example, or a batch of equal rows, all distances and cosines are 0.

    Raises:
        ValueError: a negative weight, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Park et al., *Relational Knowledge Distillation*, CVPR 2019, https://arxiv.org/abs/1904.05068. The authors' code
    clamps distances to at least 1e-6, so two equal rows have a gradient of 1e11. The angles are computed one vertex i
    at a time, and again in the backward pass, from the distances of all pairs. If some pair is so close that this would
    lose precision, distances and angles are computed from the differences.

    >>> import torch
    >>> from kdtorch import rkd_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> t = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> print(f"{rkd_loss(s, t):.4f}")
    4.4266
    """
    distance_weight = scalar(non_negative("distance_weight", distance_weight, student, teacher), student, teacher)
    angle_weight = scalar(non_negative("angle_weight", angle_weight, student, teacher), student, teacher)
    rows = gather(student, teacher, where, reduction, group)
    return _loss(rows, where, reduction, group, distance_weight, angle_weight)


def _evaluate(pairs: Pairs, distance_weight: Tensor, angle_weight: Tensor) -> tuple[Tensor, Tensor]:
    every, ours, number = slice(0, len(pairs.student)), pairs.ours, len(pairs.student)
    s, t = squares(pairs.student, every), squares(pairs.teacher, every)
    (d, below), (e, below_teacher) = _root(s.square), _root(t.square)
    others = number * max(number - 1, 1)
    mean, of_teacher = (torch.where(x.sum() == 0, 1, x.sum() / others) for x in (d, e))
    gap = d[ours] / mean - e[ours] / of_teacher
    slope = gap.clamp(-1, 1)
    value = torch.linalg.vecdot(slope, gap - slope / 2) * (distance_weight / number)
    pull, gradient = None, gap.new_empty(0)
    if pairs.asked:  # first with respect to the distances, then with respect to their squares
        slope.mul_((distance_weight / number / mean) * pairs.weights[:, None])
        pull = torch.zeros_like(d).sub_((slope * d[ours]).sum() / (mean * others))
        pull[ours] += slope
        pull.mul_(below / 2)
        gradient = torch.zeros_like(s.rows)
    weights = (angle_weight / number**2 * pairs.weights).tolist()
    if angle_weight == 0:
        angles = torch.zeros_like(value)
    elif s.clear and t.clear:
        angles = _by_distances(s, d, below, t, e, below_teacher, ours, weights, pull)
    else:
        angles = _by_differences(s, t, ours, weights, gradient if pairs.asked else None)
    if pull is not None:
        gradient += s.pulled(pull)
    return value + angles * (angle_weight / number**2), gradient


def _root(square: Tensor) -> tuple[Tensor, Tensor]:
    """The distances and their reciprocals, which are 0 where a distance is 0."""
    root = square.sqrt()
    return root, torch.where(root > 0, 1 / root, 0)


def _by_distances(
    s: Squares,
    d: Tensor,
    below: Tensor,
    t: Squares,
    e: Tensor,
    below_teacher: Tensor,
    ours: slice,
    weights: list[float],
    pull: Tensor | None,
) -> Tensor:
    """The sum over the angles at each of this rank's rows, one row at a time, by the law of cosines.

    The gradient with respect to the squares is added to `pull`. With w = 1 / d, the cosine at i between j and k is
    (d_j w_k + w_j d_k - w_j w_k d_jk^2) / 2.
    """
    value = d.new_zeros(len(weights))
    for block in blocks(len(d), d):
        square, other = s.square[block], t.square[block]
        for i, (place, weight) in enumerate(zip(range(ours.start, ours.stop), weights, strict=True)):
            a, w, b, v = d[place], below[place], e[place], below_teacher[place]
            left = torch.stack([a[block], w[block], -b[block], -v[block]], 1) / 2
            gap = left @ torch.stack([w, a, v, b])
            gap.addcmul_(square * w, w[block, None], value=-0.5)
            gap.addcmul_(other * v, v[block, None], value=0.5)
            slope = gap.clamp(-1, 1)
            value[i] += torch.linalg.vecdot(slope, gap.sub_(slope, alpha=0.5)).sum()
            if pull is None:
                continue
            over, of_distance = (slope @ torch.stack([w, a], 1)).unbind(1)
            slope.mul_(w)
            of_distance = of_distance - torch.linalg.vecdot(slope, square)
            pull[block].addcmul_(slope, w[block, None], value=-weight / 2)
            pull[place, block] += (weight / 2) * w[block] * (over - w[block].square() * of_distance)
    return value


def _by_differences(s: Squares, t: Squares, ours: slice, weights: list[float], gradient: Tensor | None) -> Tensor:
    """The same, computed from the differences of the rows, whose gradient is added to `gradient`."""
    value = s.rows.new_zeros(len(weights))
    for i, (place, weight) in enumerate(zip(range(ours.start, ours.stop), weights, strict=True)):
        apart = s.differences(s.rows[place])
        sides, others = unit(apart), unit(t.differences(t.rows[place]))
        gap = sides @ sides.T - others @ others.T
        slope = gap.clamp(-1, 1)
        value[i] = torch.linalg.vecdot(slope, gap.sub_(slope, alpha=0.5)).sum()
        if gradient is not None:
            pull = unit_pull(apart, (slope @ sides).mul_(2 * weight)).div_(2 * s.unit)
            gradient[place] += pull.sum(0)
            gradient -= pull
    return value


_loss = over_pairs(_evaluate, "Tensor distance_weight, Tensor angle_weight, ")
