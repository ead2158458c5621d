"""Correlations between classes and between samples, the student's against the teacher's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import all_sum, check_batch, size
from kdtorch._numerics import (
    check_classes,
    non_negative,
    positive,
    promote,
    pulled_back,
    scalar,
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
    """Of which the mean over ranks is the loss of the whole batch, and its gradients with respect to this rank's rows and T."""
    x, y = zero_masked(kept, *promote(x, y))
    number, ranks = _number(x, kept, x.dtype, group), size(group)
    p, q, apart = zero_masked(kept, *softmaxes(x, y, temperature))
    used = _used(x, y, kept, group)
    classes = used.sum().clamp(min=1)
    level = used / classes  # the mean of a row, which sums to one
    rows = p - level, q - level, apart
    columns = _centered((p, q, apart), kept, number, group)
    of_rows, by_row = _gap(*rows, eps, 1)
    of_columns, by_column = _gap(*columns, eps, 0, group)
    (row,) = zero_masked(kept, torch.ones_like(of_rows) * beta * ranks / number)
    column = gamma * used / classes
    value = temperature**2 * ((row * of_rows).sum() + (column * of_columns).sum())
    gradient = cooling = value.new_empty(0)
    if of_student or of_temperature:
        gradient = temperature * pulled_back(row * by_row + ranks * column * by_column, p)
        (gradient,) = zero_masked(kept, gradient)
    if of_temperature:
        _, by_row = _gap(*_turned(*rows), eps, 1)
        _, by_column = _gap(*_turned(*columns), eps, 0, group)
        of_teacher = temperature * pulled_back(row * by_row + ranks * column * by_column, q)
        cooling = (2 * value - _moment(gradient, x) - _moment(of_teacher, y)) / temperature
    return value, gradient, cooling


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
    x: Tensor, y: Tensor, apart: Tensor, eps: Scalar, axis: int, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """1 - rho of the rows or columns of x and y, centred, of which `apart` is the difference, and its gradient by x.

    It is (|x| |y| |u|^2 / 2 + eps) / (|x| |y| + eps), u the difference of the two unit vectors, which comes from `apart` so
    that it keeps its digits where x and y are near. The unit vector of 0 is 0, and its gradient -y / eps.
    """

    def dots(*pairs: tuple[Tensor, Tensor]) -> Tensor:
        return all_sum(torch.stack([torch.linalg.vecdot(a, b, dim=axis).unsqueeze(axis) for a, b in pairs]), group)

    square_x, square_y, along = dots((x, x), (y, y), (apart, x + y))
    length_x, length_y = square_x.sqrt(), square_y.sqrt()
    product = length_x * length_y
    longer = _ratio(along, length_x + length_y)  # by so much is x longer than y
    shorter = torch.where(length_x < length_y, x, y)
    apart = _ratio(apart, torch.maximum(length_x, length_y)) - _ratio(longer, product) * shorter
    (square,) = dots((apart, apart))
    gap = (product * square / 2 + eps) / (product + eps)
    return gap, length_y / (product + eps) * (apart - _ratio(gap, length_x) * x)


def _ratio(x: Tensor, length: Tensor) -> Tensor:
    """x / length; 0 where the length is."""
    return torch.where(length == 0, 0, x / length)


def _turned(x: Tensor, y: Tensor, apart: Tensor) -> tuple[Tensor, ...]:
    return y, x, -apart


def _moment(gradient: Tensor, x: Tensor) -> Tensor:
    """The sum of the gradient times the logits, of which a class at -inf has none."""
    return (gradient * (x - x.amax(-1, keepdim=True)).nan_to_num(nan=math.nan, neginf=0.0)).sum()
