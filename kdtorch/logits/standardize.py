"""Standardised logits, as inputs of logit losses, so that the scale of the teacher's logits is not distilled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdtorch._numerics import check_classes, no_autocast, positive
from kdtorch._rowwise import by_rows
from kdtorch._typing import Float, Scalar, checked


@checked
def standardize_logits(
    logits: Float[Tensor, "*batch classes"],
    *,
    temperature: Scalar = 1.0,
) -> Tensor:
    r"""Logits with mean 0 and standard deviation 1 over the classes of each example, divided by T.

    $$\frac{z-\bar z}{(\sigma+10^{-7})\,T},\qquad \sigma^2=\frac1{C-1}\sum_c(z_c-\bar z)^2$$

    This is not a loss: apply it to the logits of student and teacher, and pass the results to a logit loss.

    Args:
        logits: `[*batch, classes]`, of student or teacher. The function is differentiable; a loss stops the gradient of
            the teacher.
        temperature: T > 0; a tensor has a gradient.

    Returns:
        An array of the shape of `logits`, in float32 or float64. A class at -inf stays at -inf and is left out of the
        mean, σ and C. If fewer than 2 classes are left, the results are 0. A constant row becomes 0 too; its gradient
        is 10⁷ / T times that of subtracting the mean.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes.
        TypeError: a shape or dtype that does not fit.

    Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024, https://arxiv.org/abs/2403.01427. The
    authors' loss is `9 * kl_loss(standardize_logits(s), standardize_logits(t), temperature=2.0)`. For σ their code
    divides by C - 1, as this function does; the paper divides by C.

    >>> import torch
    >>> from kdtorch import standardize_logits
    >>> print([round(x, 4) for x in standardize_logits(torch.tensor([3.0, 0.0, 6.0, 3.0]), temperature=2.0).tolist()])
    [0.0, -0.6124, 0.6124, 0.0]
    """
    check_classes(logits)
    temperature = positive("temperature", temperature, logits)
    return _Standardized.apply(logits, temperature)


class _Standardized(torch.autograd.Function):
    """Only the logits are stored until the backward pass, which computes everything from them again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, temperature: Scalar) -> Tensor:
        return by_rows(standardized, None, x, temperature)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, temperature = inputs
        learned = isinstance(temperature, Tensor)
        ctx.save_for_backward(x, *([temperature] if learned else []))
        ctx.temperature = None if learned else temperature

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        x, *learned = ctx.saved_tensors
        with no_autocast(cotangent):
            temperature = learned[0] if learned else ctx.temperature
            gradient, along = by_rows(_pulled_back, None, x, cotangent, temperature)
            return gradient.to(x.dtype), -along.sum() / temperature if learned else None


def standardized(x: Tensor, temperature: Scalar) -> tuple[Tensor]:
    centered, deviation, _ = _centered(x)
    return (torch.where(x.isneginf(), -math.inf, centered / (deviation + 1e-7 / 8) / temperature),)


def _pulled_back(x: Tensor, cotangent: Tensor, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """The gradient [c - mean c - z (z.c) / ((C - 1) s (s + 1e-7))] / ((s + 1e-7) T), z centred; and its dot with c."""
    centered, deviation, number = _centered(x)
    absent = x.isneginf()
    c = torch.where(absent, 0, cotangent)
    c = torch.where(absent, 0, c - c.sum(-1, keepdim=True) / number.clamp(min=1))
    whole = deviation + 1e-7 / 8
    unit = centered / torch.where(deviation == 0, math.inf, deviation)
    along = (unit * c).sum(-1, keepdim=True) * (deviation / whole)
    gradient = (c - unit * along / (number - 1).clamp(min=1)) / whole / temperature / 8
    return gradient, along.squeeze(-1) / temperature


def _centered(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits minus their mean (0 for a class at -inf) and the standard deviation, both divided by 8; and the number
    of classes above -inf.

    The largest entry is subtracted first, so that a constant row becomes exactly 0; only numbers up to 1 are squared.
    The division by 8 keeps the difference of two finite numbers and the reciprocal of the deviation in range.
    """
    x, absent = x / 8, x.isneginf()
    number = (~absent).sum(-1, keepdim=True, dtype=x.dtype)
    peak = x.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    below = torch.where(absent, 0, x - peak)
    centered = torch.where(absent, 0, below - below.sum(-1, keepdim=True) / number.clamp(min=1))
    scale = centered.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(x.dtype).tiny
    square = (centered / torch.where(zero, math.inf, scale)).square().sum(-1, keepdim=True)
    deviation = scale * (torch.where(zero, 1, square) / (number - 1).clamp(min=1)).sqrt()
    return centered, torch.where(zero, 0, deviation), number
