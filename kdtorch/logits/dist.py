"""Compares the correlations between classes and between samples of student and teacher."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdtorch._collectives import all_sum, check_batch, size
from kdtorch._numerics import (
    check_classes,
    eager_on_cpu,
    non_negative,
    positive,
    promote,
    pulled_back,
    quick_softmax,
    scalar,
    softmax,
    softmax_pulled_back,
    softmaxes,
    with_gradients,
)
from kdtorch._reduce import check_reduction, count, zero_masked
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked


@checked
def dist_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-8,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""DIST: the classes of each example, and the examples of each class, should correlate with the teacher's.

    $$T^2\left[\beta\left(1-\frac1B\sum_i\rho(p_i,q_i)\right)+\gamma\left(1-\frac1C\sum_c\rho(p^c,q^c)\right)\right],\qquad
    \rho(x,y)=\frac{(x-\bar x)\cdot(y-\bar y)}{\|x-\bar x\|\,\|y-\bar y\|+\varepsilon}$$

    for p = softmax(s/T) and q = softmax(t/T). Their rows are the examples, and their columns p^c and q^c are the
    classes. Pearson's correlation ρ does not depend on mean and scale, so a student that is far weaker than its teacher
    can match it.

    Args:
        student_logits: `[batch, classes]`.
        teacher_logits: the same shape; constant.
        beta: weight of the relations between classes, one for each example; a constant.
        gamma: weight of the relations between examples, one for each class; a constant.
        temperature: T > 0; a tensor has a gradient.
        eps: ε > 0, which is added to the product of the norms; a constant.
        where: `[batch]`, False for examples that are left out, also from the relations of the classes.
        reduction: `"mean"`, or `"sum"`, which is the mean times the number of kept examples; `"none"` is an error.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, at most 2 T² (β + γ). Because of ε it is not exactly 0 if student and teacher are equal. With one
        example the second term is γT². A class at -inf in both, in every example, is left out of C and of the means.

    Raises:
        ValueError: a temperature or ε that is not positive, a negative weight, fewer than 2 classes, an unknown
            reduction, or `"none"`, because the relation of a class belongs to the whole batch and not to single
            examples.
        TypeError: a shape or dtype that does not fit.

    Huang et al., *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022, https://arxiv.org/abs/2205.10536. As
    in the released code, ε changes the value and does not only prevent a division by zero: with many classes each has
    little probability, so the product of the norms may be below ε, and the relation near 0 even if student and teacher
    are equal. If they are close, 1 - ρ is computed from their difference, so a small loss keeps its digits.

    >>> import torch
    >>> from kdtorch import dist_loss
    >>> s = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    >>> t = torch.tensor([[1.0, 1.0, -1.0], [0.0, 2.0, 0.0]])
    >>> print(f"{dist_loss(s, t):.4f}")
    0.2518
    """
    check_classes(student_logits)
    check_of_batch(reduction)
    inputs = student_logits, teacher_logits
    temperature = scalar(positive("temperature", temperature, *inputs), *inputs)
    weights = non_negative("beta", beta, *inputs), non_negative("gamma", gamma, *inputs)
    eps = positive("eps", eps, *inputs, constant=True)
    check_batch(student_logits, group)
    value, *_ = _of_batch(student_logits, temperature, teacher_logits, where, *weights, eps, group)
    return value * _number(student_logits, where, value.dtype, group) if reduction == "sum" else value


def check_of_batch(reduction: str) -> None:
    check_reduction(reduction)
    if reduction == "none":
        raise ValueError(
            '`reduction` must be "mean" or "sum" in dist_loss, got \'none\': the relation of a class belongs to the '
            "whole batch and cannot be divided among the examples"
        )


def _number(x: Tensor, kept: Tensor | None, dtype: torch.dtype, group: ProcessGroup | None) -> Tensor | int:
    """The number of kept examples on all ranks, at least one."""
    return max(len(x), 1) * size(group) if kept is None else count(kept, dtype, group)


# With a gradient by hand, because a uniform row, whose norm has no derivative, has one in the product with the teacher's.
def _value_and_gradients(
    x: Tensor,
    temperature: Tensor,
    y: Tensor,
    kept: Tensor | None,
    beta: Scalar,
    gamma: Scalar,
    eps: Scalar,
    group: ProcessGroup | None,
    of_student: bool,
    of_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A value whose mean over ranks is the loss of the whole batch, and its gradients for this rank's rows and for T.

    If student and teacher are close, p - q is computed in a way that keeps its digits.
    """
    x, y = zero_masked(kept, *promote(x, y))
    number, ranks, used = _number(x, kept, x.dtype, group), size(group), _used(x, y, kept, group)
    classes = used.sum().clamp(min=1)
    p, q = (_above_mean(z, used / classes, temperature, kept, group) for z in (x, y))
    (row,) = zero_masked(kept, torch.ones_like(x[:, :1]) * beta / number)
    relations = functools.partial(_relations, row, gamma * used / classes, number, kept, eps, group)
    eager = eager_on_cpu(x, y, temperature)
    apart = None if eager else zero_masked(kept, softmaxes(x, y, temperature)[2])[0]
    value, gradient = relations(p, q, apart)
    if eager and bool(all_sum(value, group) < 0.1 * ranks * (beta + gamma)):
        (apart,) = zero_masked(kept, softmaxes(x, y, temperature)[2])
        value, gradient = relations(p, q, apart)
    value, cooling = temperature**2 * value, value
    if of_student or of_temperature:
        (gradient,) = zero_masked(kept, _pulled_back(gradient, p.p).mul_(temperature))
    if of_temperature:
        _, of_teacher = relations(q, p, None if apart is None else -apart)
        moments = _moment(gradient, x) + _moment(temperature * _pulled_back(of_teacher, q.p), y)
        cooling = (2 * value - moments) / temperature
    return value, gradient, cooling


def _relations(
    row: Tensor,
    column: Tensor,
    number: Tensor | int,
    kept: Tensor | None,
    eps: Scalar,
    group: ProcessGroup | None,
    p: _Probabilities,
    q: _Probabilities,
    apart: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of 1 - rho over this rank's rows and over all columns, and its gradient with respect to p.

    Args:
        row: the weights of the rows, 0 for masked ones.
        column: the weights of the columns, 0 for unused ones.
        number: the number of kept rows on all ranks.
        apart: p - q, if p and q are close.
    """
    ranks, difference = size(group), () if apart is None else (apart,)
    of_rows, by_row = _gap((p.in_rows, q.in_rows, *difference), ranks * row, eps, 1)
    columns = _centered((p.in_columns, q.in_columns, *difference), kept, number, group)
    of_columns, by_column = _gap(columns, ranks * column, eps, 0, group)
    return of_rows + of_columns / ranks, by_row + by_column


_of_batch = with_gradients(_value_and_gradients, learns=2)


def _used(x: Tensor, y: Tensor, kept: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """1 for each class that is above -inf in at least one kept row of student or teacher."""
    number = x.new_full((1, x.shape[1]), len(x))
    if not (eager_on_cpu(x, y) and kept is None and bool((x.sum(0) + y.sum(0)).isfinite().all())):
        (above,) = zero_masked(kept, (torch.maximum(x, y) > -math.inf).to(x.dtype))
        number = above.sum(0, keepdim=True)
    return all_sum(number, group).clamp(max=1)


class _Probabilities(NamedTuple):
    """p = softmax(x / T), p minus the mean of its row, and whichever of the two is used for the columns."""

    p: Tensor
    in_rows: Tensor
    in_columns: Tensor


def _above_mean(
    x: Tensor, mean: Tensor, temperature: Tensor, kept: Tensor | None, group: ProcessGroup | None
) -> _Probabilities:
    """The probabilities; in nearly uniform rows, p minus the mean is computed in a way that keeps its digits."""
    eager, largest = eager_on_cpu(x, temperature), mean.amax()
    p = quick_softmax(x, float(temperature)) if eager else softmax(x, temperature).p
    p, above = zero_masked(kept, p, p - mean)
    uniform = torch.linalg.vector_norm(above, dim=1).square() < 0.01 * largest
    apart = all_sum((~uniform if kept is None else ~uniform & kept).sum(), group)
    if eager and not bool((uniform if kept is None else uniform & kept).any()):
        return _Probabilities(p, above, p)
    _, peak, log_total = softmax(x, temperature)
    ratio = torch.maximum((x - peak) / temperature, x.new_full((), -1e5)) - (log_total + largest.log())
    near = ratio < 1
    above = torch.where(near, mean * torch.where(near, ratio, 0).expm1(), p - mean)
    (above,) = zero_masked(kept, above - mean * above.sum(-1, keepdim=True))
    return _Probabilities(p, above, torch.where(apart == 0, above, p))


def _centered(
    arrays: tuple[Tensor, ...], kept: Tensor | None, number: Tensor | int, group: ProcessGroup | None
) -> tuple[Tensor, ...]:
    """The array minus the mean of each column over kept rows, twice, so that a column of equal entries is exactly 0."""
    for again in (False, True):
        means = all_sum(torch.stack([x.sum(0, keepdim=True) for x in arrays]), group) / number
        pairs = zip(arrays, means, strict=True)
        arrays = zero_masked(kept, *(x.sub_(mean) if again else x - mean for x, mean in pairs))
    return arrays


def _gap(
    arrays: tuple[Tensor, ...], weight: Tensor, eps: Scalar, axis: int, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of 1 - rho over rows or columns, and its gradient with respect to x.

    The first two arrays are x and y, centred. 1 - rho is (|x| |y| |u|^2 / 2 + eps) / (|x| |y| + eps), where u is the
    difference of the two unit vectors, and the unit vector of 0 is 0. Its gradient is (u - (1 - rho) x / |x|) |y| /
    (|x| |y| + eps). If there is a third array, x - y, u is computed from it, so that u keeps its digits if x and y are
    close; otherwise |x| |y| |u|^2 / 2 is computed as |x| |y| - x.y.
    """

    def dots(*pairs: tuple[Tensor, Tensor]) -> Tensor:
        return all_sum(torch.stack([torch.linalg.vecdot(a, b, dim=axis).unsqueeze(axis) for a, b in pairs]), group)

    x, y, *apart = arrays
    square_x, square_y, along = dots((x, x), (y, y), (apart[0], x + y) if apart else (x, y))
    length_x, length_y = square_x.sqrt(), square_y.sqrt()
    inverse_x, inverse_y = _inverse(length_x), _inverse(length_y)
    product = length_x * length_y
    pull = weight * length_y / (product + eps)
    if not apart:
        gap = (product - along + eps) / (product + eps)
        gradient = (pull * (1 - gap) * inverse_x * x).sub_(pull * inverse_y * y)
    else:
        longer = along * _inverse(length_x + length_y) * inverse_x * inverse_y  # how much longer x is than y
        shorter = length_x < length_y
        u = (_inverse(torch.maximum(length_x, length_y)) * apart[0]).sub_(torch.where(shorter, longer, 0) * x)
        u.sub_(torch.where(shorter, 0, longer) * y)
        (square,) = dots((u, u))
        gap = (product * square / 2 + eps) / (product + eps)
        gradient = (pull * u).sub_(pull * gap * inverse_x * x)
    return (weight * gap).sum(), gradient


def _inverse(length: Tensor) -> Tensor:
    """1 / length; 0 where the length is 0."""
    return torch.where(length == 0, 0, 1 / length)


def _pulled_back(gradient: Tensor, p: Tensor) -> Tensor:
    """`pulled_back` for finite entries, in few kernels where these are fast."""
    if not eager_on_cpu(gradient, p):
        return pulled_back(gradient, p)
    return softmax_pulled_back(gradient - torch.linalg.vecdot(gradient, p).unsqueeze(-1), p)


def _moment(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum of the gradient times the logits, where a class at -inf contributes nothing."""
    return (gradient * (x - x.amax(-1, keepdim=True)).nan_to_num(nan=math.nan, neginf=0.0)).sum()
