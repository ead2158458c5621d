"""Decoupled knowledge distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._numerics import (
    FAR,
    check_classes,
    eager_on_cpu,
    kl_and_gradient,
    kl_of_softmaxes,
    kl_of_tilt,
    log_ratio,
    non_negative,
    positive,
    tilt,
    valid_index,
    weigh,
    without_class,
)
from kdtorch._reduce import reduce, zero_masked
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked


@checked(dtensor="rows")
def dkd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    labels: Integer[Tensor, "*batch"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Decoupled knowledge distillation: the label against all other classes, and the other classes among themselves.

    $$T^2\left[\alpha\,\mathrm{KL}\big((q_y,1-q_y)\,\|\,(p_y,1-p_y)\big)+\beta\,\mathrm{KL}(\hat q\,\|\,\hat p)\right]$$

    with p = softmax(s/T), q = softmax(t/T); hats are softmaxes over the classes other than the label y.

    Args:
        student_logits: `[*batch, classes]`.
        teacher_logits: the same shape; constant.
        labels: `[*batch]`, the class of each example; one outside `0 .. classes - 1` is an error.
        alpha: weight of the target part (TCKD), ≥ 0; a constant.
        beta: weight of the non-target part (NCKD), ≥ 0; a constant. With α = 1, and β = 1 − q_y for each example, the
            loss is KL.
        temperature: T > 0; a tensor has a gradient.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree and never negative.

    Raises:
        ValueError: a temperature that is not positive, a negative weight, fewer than 2 classes, an unknown reduction.
        IndexError: a label outside `0 .. classes - 1`.
        TypeError: a shape or dtype that does not fit.

    Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022, https://arxiv.org/abs/2203.08679. The released code
    hides the label by subtracting 1000 and takes the logarithm of a sum of probabilities, which is NaN once logits
    are about 100·T apart in float32; the mathematics is the same.

    >>> import torch
    >>> from kdtorch import dkd_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{dkd_loss(s, t, torch.tensor([0])):.4f}")
    1.2644
    """
    check_classes(student_logits)
    logits = student_logits, teacher_logits
    alpha, beta = non_negative("alpha", alpha, *logits), non_negative("beta", beta, *logits)
    temperature = positive("temperature", temperature, *logits)
    (labels,) = zero_masked(where, labels)
    labels = valid_index("labels", labels, student_logits.shape[-1])
    return reduce(_decoupled(*logits, labels, alpha, beta, temperature, where=where), where, reduction, group)


def decoupled_and_gradient(
    x: Tensor, y: Tensor, labels: Tensor, alpha: Scalar, beta: Scalar, temperature: Scalar
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient: a T (p_y - q_y) at the label, b T (^p - ^q) - a T (p_y - q_y) ^p at the others.

    The gradient is written by hand and shares softmaxes with the value, for the speed and memory in
    docs/performance.md.
    """
    label = labels.unsqueeze(-1)
    hat_p, totals, others, difference = _others(x, y, labels, temperature)
    x_binary = _binary(x.gather(-1, label), *totals[0], temperature)
    y_binary = _binary(y.gather(-1, label), *totals[1], temperature)
    target, target_gradient = kl_and_gradient(x_binary, y_binary, 1.0)
    at_label = alpha * temperature * target_gradient[..., :1]
    gradient = beta * temperature * difference - at_label * hat_p
    square = temperature**2  # multiplied before the sum, which might overflow
    value = weigh(square * alpha, target) + weigh(square * beta, others)
    return value, gradient.scatter(-1, label, at_label)


_decoupled = rowwise(decoupled_and_gradient)

Total = tuple[Tensor, Tensor]  # the largest logit, and log sum exp((x - largest) / T)


def _others(
    x: Tensor, y: Tensor, labels: Tensor, temperature: Scalar
) -> tuple[Tensor, tuple[Total, Total], Tensor, Tensor]:
    """^p, the totals of x and y, KL(^q || ^p) and ^p - ^q over the classes other than the label, if there are any."""
    if eager_on_cpu(x, y, temperature):
        far = [without_class(logits, labels, FAR) for logits in (x, y)]
        peaks = [logits.amax(-1, keepdim=True) for logits in far]
        tilted = tilt(far[0], far[1], temperature) if all(bool((peak > FAR).all()) for peak in peaks) else None
        if tilted is not None:
            value, difference = kl_of_tilt(tilted), tilted.excess.div_(1 + tilted.rise)
            of_y = peaks[1], -tilted.q.amax(-1, keepdim=True).log()
            hat_p = tilted.q.add_(difference)
            return hat_p, ((peaks[0], -hat_p.amax(-1, keepdim=True).log()), of_y), value, difference
    p, q, ratio = log_ratio(without_class(x, labels), without_class(y, labels), temperature, may_be_empty=True)
    return p.p, (p[1:], q[1:]), *kl_of_softmaxes(p, q, ratio)


def _binary(at_label: Tensor, peak: Tensor, log_total: Tensor, temperature: Scalar) -> Tensor:
    """Logits, at temperature 1, of (the label, any other class), minus the largest, which would only cost digits."""
    empty = peak == torch.finfo(peak.dtype).min
    largest = torch.maximum(at_label, torch.where(empty, -math.inf, peak))
    rest = torch.where(empty, -math.inf, (peak - largest) / temperature + log_total)
    return torch.cat([(at_label - largest) / temperature, rest], -1)
