"""What runs a function of rows on the logits of two linear heads, which are made a block at a time and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdtorch._numerics import coupled, custom_op, dot, widest

BLOCK = 2**22  # entries of the logits of a block of rows, and of a part of a head in half precision


def linear(
    value_and_gradient: Callable[..., tuple[Tensor, Tensor]], of_teacher: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A function of a student's and a teacher's hidden states and heads from one of rows of logits.

    `value_and_gradient(x, y, [setting,] temperature)` returns the value of each row and its gradient by x, and
    `of_teacher` the gradient by y; the value must be one of x / T and y / T, so that its derivative by T is
    -(x · ∂x + y · ∂y) / T. What is returned gives the sum over the kept rows, whose gradients are made with it and are all
    that is held, or with `summed=False` a value a row, whose gradients the backward pass makes from the inputs.
    """

    def evaluate(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        temperature: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor,
        where: Tensor | None,
        setting: float | None,
        weights: Tensor | None,
        of_hidden: bool,
        of_weight: bool,
        of_bias: bool,
        of_temperature: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        student, teacher = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
        asked = of_hidden, of_weight, of_bias, of_temperature
        return _evaluate(value_and_gradient, of_teacher, student, teacher, temperature, where, setting, weights, asked)

    evaluate.__name__ = evaluate.__qualname__ = value_and_gradient.__name__
    operator = custom_op(
        "(Tensor hidden, Tensor weight, Tensor bias, Tensor temperature, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor teacher_bias, Tensor? where, float? setting, Tensor? weights, bool of_hidden, bool of_weight, "
        "bool of_bias, bool of_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _shapes,
    )(evaluate)
    return coupled(operator, learns=4)


def _shapes(hidden: Tensor, weight: Tensor, bias: Tensor, temperature: Tensor, *others: object) -> tuple[Tensor, ...]:
    dtype, learned = widest(hidden, weight), (hidden, weight, bias, temperature)
    gradients = (
        x.new_empty(x.shape if wanted else 0, dtype=dtype) for x, wanted in zip(learned, others[-4:], strict=True)
    )
    return hidden.new_empty(hidden.shape[:-1], dtype=dtype), *gradients


def _evaluate(
    value_and_gradient: Callable[..., tuple[Tensor, Tensor]],
    of_teacher: Callable[..., Tensor],
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    temperature: Tensor,
    where: Tensor | None,
    setting: float | None,
    weights: Tensor | None,
    asked: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The value of each row, and the gradients of their weighted sum that are asked for."""
    (hidden, weight, bias), (other_hidden, other_weight, other_bias) = student, teacher
    dtype = widest(hidden, weight, other_hidden, other_weight)
    of_hidden, of_weight, of_bias, of_temperature = (
        x.new_zeros(x.shape if wanted else 0, dtype=dtype)
        for x, wanted in zip((hidden, weight, bias, temperature), asked, strict=True)
    )
    settings = [temperature] if setting is None else [setting, temperature]
    values = hidden.new_zeros(hidden.shape[:-1], dtype=dtype)
    flat, rows, other_rows = values.view(-1), *(x.reshape(-1, x.shape[-1]) for x in (hidden, other_hidden))
    pulled = of_hidden.view(-1, hidden.shape[-1]) if asked[0] else of_hidden
    places = torch.arange(len(rows), device=hidden.device) if where is None else where.flatten().nonzero().squeeze(-1)
    for kept in places.split(max(BLOCK // len(weight), 1)):
        h = rows[kept]
        x = _logits(h, weight, bias, dtype)
        y = _logits(other_rows[kept], other_weight, other_bias, dtype)
        value, gradient = value_and_gradient(x, y, *settings)
        flat[kept] = value
        factor = None if weights is None else weights.flatten()[kept].unsqueeze(-1)
        if factor is not None:
            gradient = gradient * factor
        if asked[3]:
            pull = of_teacher(x, y, *settings)
            pull = pull if factor is None else pull * factor
            of_temperature -= (dot(gradient, x) + dot(pull, y)).sum() / temperature
        if asked[2] and bias.numel():
            of_bias += gradient.sum(0)
        if asked[1]:
            of_weight.addmm_(gradient.T, h.to(dtype))
        if asked[0]:
            pulled[kept] = _product(gradient, weight)
    return values, of_hidden, of_weight, of_bias, of_temperature


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden weightᵀ + bias in `dtype`, without a copy of the whole head in it."""
    hidden = hidden.to(dtype)
    if weight.dtype == dtype:
        logits = hidden @ weight.T
    else:
        logits = torch.cat([hidden @ weight[part].to(dtype).T for part in _parts(weight)], -1)
    return logits.add_(bias) if bias.numel() else logits


def _product(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient weight, in the gradient's dtype."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    product = gradient.new_zeros(len(gradient), weight.shape[-1])
    for part in _parts(weight):
        product.addmm_(gradient[:, part], weight[part].to(gradient.dtype))
    return product


def _parts(weight: Tensor) -> Iterator[slice]:
    size = max(BLOCK // weight.shape[-1], 1)
    return (slice(first, first + size) for first in range(0, len(weight), size))
