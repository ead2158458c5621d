"""Generalised Jensen-Shannon divergence between student and teacher, as GKD trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import class_sum
from kdtorch._numerics import (
    NEAR,
    check_classes,
    exp_remainder,
    far_apart,
    fraction,
    less_common_error,
    log_ratio,
    nearly_equal,
    positive,
    pulled_back,
    quick_logs,
    quick_softmax,
    series_of_log1p,
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
    class_group: ProcessGroup | None = None,
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
        class_group: the process group that the classes are spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree and never negative.
        Between the ends it is at most the entropy of (β, 1 - β), also where one of the two gives -inf to a class that
        the other uses. At the ends it is inf where the KL divergence is.

    Raises:
        ValueError: a β outside 0 to 1, a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit, a β that is a tensor.

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024,
    https://arxiv.org/abs/2306.13649. In TRL and Liger β is the same weight; in DistiLLM's code the weight is 1 - β.
    Their gradients are NaN if a logit is -inf.

    >>> import torch
    >>> from kdtorch import jsd_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{jsd_loss(s, t, beta=0.1):.4f}")
    0.0352
    """
    check_classes(student_logits, class_group, group)
    logits = student_logits, teacher_logits
    weight, temperature = fraction("beta", beta, *logits), positive("temperature", temperature, *logits)
    if weight == 0:
        divergence = kl_divergence(*logits, temperature, where=where, class_group=class_group)
    elif weight == 1:
        divergence = reverse_kl_divergence(*logits, temperature, where=where, class_group=class_group)
    else:
        divergence = jensen_shannon(*logits, weight, temperature, where=where, class_group=class_group)
    return reduce(divergence, where, reduction, group)


def jsd_and_gradient(
    x: Tensor, y: Tensor, beta: float, temperature: Scalar, class_group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The divergence for 0 < b < 1, and its gradient (1 - b) p (h - sum p h) / T, where h = log(p / m).

    If p and q are close, the terms are b q (w - log(1 + w)) + (1 - b) p (w' - log(1 + w')), with w = m / q - 1 and
    w' = m / p - 1. They are never negative, and keep their digits.
    """
    quick = _of_tilt(x, y, beta, temperature, class_group) or _of_logs(x, y, beta, temperature, class_group)
    if quick is not None:
        return quick
    (p, *_), (q, *_), ratio = log_ratio(x, y, temperature, class_group=class_group)
    ratio = ratio.clamp(-1e5, 1e5)  # infinite for a class at -inf in one of the two
    near = ratio.abs() < NEAR
    close = torch.where(near, ratio, 0)
    growth = close + exp_remainder(close)
    to_p, rest_p = series_of_log1p(-beta * growth / (1 + growth))
    log_b, log_rest = math.log(beta), math.log1p(-beta)
    odds = ratio + log_rest - log_b  # log of (1 - b) p / b q
    less = odds < 0
    small = torch.where(less, odds, -odds).exp()
    log, rest_q = series_of_log1p(torch.where(near, (1 - beta) * growth, small))
    # log(m / b q) and log(m / (1 - b) p)
    far_q, far_p = torch.where(less, log, log + odds), torch.where(less, log - odds, log)
    terms = torch.where(
        near,
        beta * q * rest_q + (1 - beta) * p * rest_p,
        -beta * q * (log_b + far_q) - (1 - beta) * p * (log_rest + far_p),
    )
    _, common = less_common_error(torch.where(near, q * growth, p - q), q, class_group)
    value = class_sum(terms, class_group) - beta * (1 - beta) * common**2 / 2
    # h is log(m / p). For rows with little in common it is nearly log(1 - b), a constant that is then left out
    room = -beta * log_b - (1 - beta) * log_rest - value.detach()
    apart = room < 0.1 * (beta - 1) * log_rest
    h = torch.where(near, to_p, far_p + log_rest)
    h = torch.where(apart, torch.where(near, to_p - log_rest, far_p), h)
    return torch.where(value < 0, 0, value).squeeze(-1), (beta - 1) * pulled_back(h, p, class_group) / temperature


def _of_tilt(
    x: Tensor, y: Tensor, beta: Scalar, temperature: Scalar, class_group: ProcessGroup | None
) -> tuple[Tensor, Tensor] | None:
    """The same in few large kernels, if `tilt` gives a result: d is log(g / f) up to a constant, and v is d - u."""
    student_first, a = beta < 0.5, min(beta, 1 - beta)
    tilted = tilt(*((y, x) if student_first else (x, y)), temperature, class_group)
    if tilted is None:
        return None
    f, temperature = tilted.q, float(temperature)
    g = quick_softmax(y if student_first else x, temperature)
    u = tilted.growth.sub_(tilted.rise).mul_(a / (1 + tilted.rise)).log1p_()
    v = tilted.d.sub_(u)
    under_f, under_g = torch.linalg.vecdot(f, u), torch.linalg.vecdot(g, v)
    value = (a * (under_g - tilted.rise.squeeze(-1).log1p()) - (1 - a) * under_f).clamp_(min=0)
    if nearly_equal(value):
        return None
    if student_first:
        return value, softmax_pulled_back(u.sub_(under_f.unsqueeze(-1)), f).mul_((beta - 1) / temperature)
    return value, softmax_pulled_back(v.sub_(under_g.unsqueeze(-1)), g).mul_((1 - beta) / temperature)


def _of_logs(
    x: Tensor, y: Tensor, beta: Scalar, temperature: Scalar, class_group: ProcessGroup | None
) -> tuple[Tensor, Tensor] | None:
    """The same for student and teacher that are far apart."""
    logs = quick_logs(x, y, temperature, class_group)
    if logs is None:
        return None
    odds = logs.log_p.sub_(logs.log_q).add_(math.log1p(-beta) - math.log(beta)).clamp_(-80, 80)
    of_q, of_p = odds.exp().log1p_(), odds.neg_().exp_().log1p_()  # log of m / b q and m / (1 - b) p
    under_q, under_p = torch.linalg.vecdot(logs.q, of_q), torch.linalg.vecdot(logs.p, of_p)
    value = -beta * (under_q + math.log(beta)) - (1 - beta) * (under_p + math.log1p(-beta))
    if not far_apart(value):
        return None
    return value, softmax_pulled_back(of_p.sub_(under_p.unsqueeze(-1)), logs.p).mul_((beta - 1) / float(temperature))


jensen_shannon = rowwise(jsd_and_gradient)
