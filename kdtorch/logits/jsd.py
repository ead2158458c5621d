"""Generalised Jensen-Shannon divergence between student and teacher, as GKD trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._numerics import (
    NEAR,
    check_classes,
    exp_remainder,
    fraction,
    less_common_error,
    log_ratio,
    nearly_equal,
    positive,
    pulled_back,
    quick_softmax,
    softmax_pulled_back,
    tilt,
)
from kdtorch._reduce import reduce
from kdtorch._rowwise import kl_divergence, rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked
from kdtorch.logits.reverse_kl import reverse_kl_divergence


@checked(dtensor="any")
def jsd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    beta: float = 0.5,
    temperature: Scalar = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Generalised Jensen–Shannon divergence: student and teacher against their mixture.

    $$\beta\,\mathrm{KL}(q\,\|\,m)+(1-\beta)\,\mathrm{KL}(p\,\|\,m),\qquad m=\beta q+(1-\beta)p,\quad
    p=\mathrm{softmax}(s/T),\quad q=\mathrm{softmax}(t/T)$$

    for 0 < β < 1. With β = 0 it is KL(q‖p), and with β = 1 KL(p‖q), as in the released codes.

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        beta: β from 0 to 1, the teacher's weight in the mixture; a number, because it chooses the formula. The formula
            tends to 0 at both ends, so that the loss jumps there.
        temperature: T > 0; a tensor has a gradient. There is no factor T².
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree and never negative.
        Between the ends it is at most the entropy of (β, 1 - β), also where one of the two gives -inf to a class that
        the other uses. At the ends it is inf where the KL divergence is.

    Raises:
        ValueError: a β outside 0 to 1, a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit, a β that is a tensor.

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024,
    https://arxiv.org/abs/2306.13649. TRL and Liger weigh as here; in DistiLLM's code the weight is 1 - β. Their
    gradients are NaN where a logit is -inf.

    >>> import torch
    >>> from kdtorch import jsd_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{jsd_loss(s, t, beta=0.1):.4f}")
    0.0352
    """
    check_classes(student_logits)
    logits = student_logits, teacher_logits
    beta, temperature = fraction("beta", beta, *logits), positive("temperature", temperature, *logits)
    if beta == 0:
        divergence = kl_divergence(*logits, temperature, where=where)
    elif beta == 1:
        divergence = reverse_kl_divergence(*logits, temperature, where=where)
    else:
        divergence = jensen_shannon(*logits, beta, temperature, where=where)
    return reduce(divergence, where, reduction, group)


def jsd_and_gradient(x: Tensor, y: Tensor, beta: Scalar, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """For 0 < b < 1 the divergence, and its gradient (1 - b) p (h - sum p h) / T with h = log(p / m).

    The mixture is m = (1 - a) f + a g, with the lesser weight a = min(b, 1 - b): f is then the student's p where b < 1/2,
    else the teacher's q. Of f and g the sum is -(1 - a) f u - a g v, with u = log(m / f) and v = log(m / g), and where they
    are close (1 - a) f (e^u - 1 - u) + a g (e^v - 1 - v): terms that are never negative, and keep their digits.
    """
    quick = _of_tilt(x, y, beta, temperature)
    if quick is not None:
        return quick
    (p, *_), (q, *_), ratio = log_ratio(x, y, temperature)
    student_first, a = beta < 0.5, min(beta, 1 - beta)
    f, g = (p, q) if student_first else (q, p)
    alone = (p == 0) | (q == 0)
    ratio = torch.where(alone, 0, -ratio if student_first else ratio)
    growth = ratio.clamp(max=60).expm1()
    _, common = less_common_error(torch.where(alone | (ratio > 1), g - f, f * growth), f)
    small = a * growth < 1
    far = (a + (1 - a) * (-torch.where(small, 0, ratio)).exp()).log()
    log = (a * torch.where(small, growth, 0)).log1p()
    u, v = torch.where(small, log, far + ratio), torch.where(small, log - ratio, far)
    near = ratio.abs() < NEAR
    close_u, close_v = (exp_remainder(torch.where(near, z, 0)) for z in (u, v))
    terms = torch.where(near, (1 - a) * f * close_u + a * g * close_v, -(1 - a) * f * u - a * g * v)
    apart = -beta * math.log(beta) * q - (1 - beta) * math.log1p(-beta) * p
    to_p = torch.where(q == 0, math.log1p(-beta), u if student_first else v)
    value = torch.where(alone, apart, terms).sum(-1) - a * (1 - a) * common.squeeze(-1) ** 2 / 2
    return value.clamp(min=0), (beta - 1) * pulled_back(to_p, p) / temperature


def _of_tilt(x: Tensor, y: Tensor, beta: float, temperature: Scalar) -> tuple[Tensor, Tensor] | None:
    """The same in few, large kernels, where `tilt` gives them: d is log(g / f) but for a number, and d - u is -v."""
    student_first, a = beta < 0.5, min(beta, 1 - beta)
    tilted = tilt(y, x, temperature) if student_first else tilt(x, y, temperature)
    if tilted is None:
        return None
    f, temperature = tilted.q, float(temperature)
    g = quick_softmax(y if student_first else x, temperature)
    u = tilted.growth.sub_(tilted.rise).mul_(a / (1 + tilted.rise)).log1p_()
    v, under_f = tilted.d.sub_(u), torch.linalg.vecdot(f, u).unsqueeze(-1)
    under_g = torch.linalg.vecdot(g, v).unsqueeze(-1)
    value = (a * (under_g - tilted.rise.log1p()) - (1 - a) * under_f).squeeze(-1).clamp_(min=0)
    if nearly_equal(value):
        return None
    if student_first:
        return value, softmax_pulled_back(u.sub_(under_f), f).mul_((beta - 1) / temperature)
    return value, softmax_pulled_back(v.sub_(under_g), g).mul_((1 - beta) / temperature)


jensen_shannon = rowwise(jsd_and_gradient)
