"""Correlations between classes and between samples, the student's against the teacher's."""

from __future__ import annotations

import functools
import math

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

    for p = softmax(s/T) and q = softmax(t/T), whose rows are the examples and whose columns, p^c and q^c, the classes.
    Pearson's correlation ρ depends neither on level nor on scale, so that a student far weaker than its teacher can follow.

    Args:
        student_logits: `[batch, classes]`.
        teacher_logits: the same shape; constant.
        beta: weight of the relations between classes, one for each example; a constant.
        gamma: weight of the relations between examples, one for each class; a constant.
        temperature: T > 0; a tensor has a gradient.
        eps: ε > 0, which is added to the product of the norms; a constant.
        where: `[batch]`, False for examples that are left out, of the relations of each class too.
        reduction: `"mean"`, or `"sum"`, which is the mean times the number of kept examples; `"none"` is an error.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, at most 2 T² (β + γ). Because of ε it is not quite 0 where student and teacher are equal. With one example
        the relation of each class is γT². A class at -inf in both, in every example, is left out of C and of the means.

    Raises:
        ValueError: a temperature or ε that is not positive, a negative weight, fewer than 2 classes, an unknown reduction,
            or `"none"`, because the relation of a class is the batch's, and no part of it an example's.
        TypeError: a shape or dtype that does not fit.

    Huang et al., *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022, https://arxiv.org/abs/2205.10536. ε is a
    term, as in the released code, and not a guard: of many classes each has little probability, so that the product of its
    norms may be below ε, and its relation near 0 even where student and teacher are equal. Where they are near each other,
    1 - ρ is computed from their difference, so that a small loss keeps its digits.

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
            '`reduction` must be "mean" or "sum" in dist_loss, got \'none\': the relation of a class is that of the whole '
            "batch, of which no part is an example's"
        )


def _number(x: Tensor, kept: Tensor | None, dtype: torch.dtype, group: ProcessGroup | None) -> Tensor | int:
    """Of kept examples on all ranks, at least one."""
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
    """Of which the mean over ranks is the loss of the whole batch, and its gradients with respect to this rank's rows and T.

    Where student and teacher are near, p - q is computed such that it keeps its digits.
    """
    x, y = zero_masked(kept, *promote(x, y))
    eager, apart = eager_on_cpu(x, y, temperature), None
    if eager:
        p, q = zero_masked(kept, *(quick_softmax(z, float(temperature)) for z in (x, y)))
    else:
        p, q, apart = zero_masked(kept, *softmaxes(x, y, temperature))
    number, ranks, used = _number(x, kept, x.dtype, group), size(group), _used(x, y, kept, group)
    classes = used.sum().clamp(min=1)
    (row,) = zero_masked(kept, torch.ones_like(x[:, :1]) * beta / number)
    relations = functools.partial(_relations, row, gamma * used / classes, used / classes, number, kept, eps, group)
    value, gradient = relations(p, q, apart)
    if eager and bool(all_sum(value, group) < 0.1 * ranks * (beta + gamma)):
        (apart,) = zero_masked(kept, softmaxes(x, y, temperature)[2])
        value, gradient = relations(p, q, apart)
    value, cooling = temperature**2 * value, value
    if of_student or of_temperature:
        (gradient,) = zero_masked(kept, temperature * _pulled_back(gradient, p))
    if of_temperature:
        _, of_teacher = relations(q, p, None if apart is None else -apart)
        moments = _moment(gradient, x) + _moment(temperature * _pulled_back(of_teacher, q), y)
        cooling = (2 * value - moments) / temperature
    return value, gradient, cooling


def _relations(
    row: Tensor,
    column: Tensor,
    level: Tensor,
    number: Tensor | int,
    kept: Tensor | None,
    eps: Scalar,
    group: ProcessGroup | None,
    p: Tensor,
    q: Tensor,
    apart: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sum of 1 - rho of this rank's rows, and of all columns, each times its weight, and its gradient by p.

    Args:
        row: the weights of the rows, 0 of those that are masked.
        column: the weights of the columns, 0 of those that are not used.
        level: what an entry is in the mean, which is what a row that sums to 1 is centred by.
        apart: p - q, where they are near.
    """
    ranks = size(group)
    columns = _centered((p, q) if apart is None else (p, q, apart), kept, number, group)
    of_rows, by_row = _gap(p - level, q - level, apart, ranks * row, eps, 1)
    of_columns, by_column = _gap(*columns[:2], None if apart is None else columns[2], ranks * column, eps, 0, group)
    return of_rows + of_columns / ranks, by_row + by_column


_of_batch = with_gradients(_value_and_gradients, learns=2)


def _used(x: Tensor, y: Tensor, kept: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """1 for each class that is above -inf in some kept row, in student or teacher."""
    (above,) = zero_masked(kept, (torch.maximum(x, y) > -math.inf).to(x.dtype))
    return all_sum(above.sum(0, keepdim=True), group).clamp(max=1)


def _centered(
    arrays: tuple[Tensor, ...], kept: Tensor | None, number: Tensor | int, group: ProcessGroup | None
) -> tuple[Tensor, ...]:
    """Less the mean of each column over kept rows; twice, so that a column of equal entries is 0 to the last digit."""
    for _ in range(2):
        sums = all_sum(torch.stack([x.sum(0, keepdim=True) for x in arrays]), group)
        arrays = zero_masked(kept, *(x - total / number for x, total in zip(arrays, sums, strict=True)))
    return arrays


def _gap(
    x: Tensor,
    y: Tensor,
    apart: Tensor | None,
    weight: Tensor,
    eps: Scalar,
    axis: int,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of 1 - rho of the rows or columns of x and y, centred, and its gradient by x.

    1 - rho is (|x| |y| |u|^2 / 2 + eps) / (|x| |y| + eps), u the difference of the two unit vectors, of which that of 0 is 0,
    and its gradient (u - (1 - rho) x / |x|) |y| / (|x| |y| + eps). If x - y is given, as `apart`, u comes from that, so that
    it keeps its digits where x and y are near; else |x| |y| |u|^2 / 2 is |x| |y| - x.y.
    """

    def dots(*pairs: tuple[Tensor, Tensor]) -> Tensor:
        return all_sum(torch.stack([torch.linalg.vecdot(a, b, dim=axis).unsqueeze(axis) for a, b in pairs]), group)

    square_x, square_y, along = dots((x, x), (y, y), (x, y) if apart is None else (apart, x + y))
    length_x, length_y = square_x.sqrt(), square_y.sqrt()
    inverse_x, inverse_y = _inverse(length_x), _inverse(length_y)
    product = length_x * length_y
    pull = weight * length_y / (product + eps)
    if apart is None:
        gap = (product - along + eps) / (product + eps)
        gradient = torch.addcmul(pull * (1 - gap) * inverse_x * x, -pull * inverse_y, y)
    else:
        longer = along * _inverse(length_x + length_y) * inverse_x * inverse_y  # by so much is x longer than y
        shorter = length_x < length_y
        u = torch.addcmul(_inverse(torch.maximum(length_x, length_y)) * apart, -torch.where(shorter, longer, 0), x)
        u = torch.addcmul(u, -torch.where(shorter, 0, longer), y)
        (square,) = dots((u, u))
        gap = (product * square / 2 + eps) / (product + eps)
        gradient = torch.addcmul(pull * u, -pull * gap * inverse_x, x)
    return (weight * gap).sum(), gradient


def _inverse(length: Tensor) -> Tensor:
    """1 / length; 0 where that is 0."""
    return torch.where(length == 0, 0, 1 / length)


def _pulled_back(gradient: Tensor, p: Tensor) -> Tensor:
    """`pulled_back`, in few kernels where they are fast; no entry is infinite."""
    if not eager_on_cpu(gradient, p):
        return pulled_back(gradient, p)
    return softmax_pulled_back(gradient - torch.linalg.vecdot(gradient, p).unsqueeze(-1), p)


def _moment(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum of the gradient times the logits, of which a class at -inf has none."""
    return (gradient * (x - x.amax(-1, keepdim=True)).nan_to_num(nan=math.nan, neginf=0.0)).sum()
