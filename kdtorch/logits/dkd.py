"""Decoupled knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import (
    check_classes,
    kl_divergence,
    log_sum_exp,
    non_negative,
    positive,
    take_class,
    valid_index,
    widen,
    without_class,
)
from kdtorch._reduce import keep, reduce
from kdtorch._typing import Bool, Float, Integer, Reduction, Scalar, checked


@checked
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
) -> Tensor:
    r"""Decoupled knowledge distillation: the label against the rest, and the rest among themselves.

    $$T^2\left[\alpha\,\mathrm{KL}\big((q_y,1-q_y)\,\|\,(p_y,1-p_y)\big)+\beta\,\mathrm{KL}(\hat q\,\|\,\hat p)\right]$$

    with p = softmax(s/T), q = softmax(t/T); hats are softmaxes over the classes other than the label y.

    Args:
        student_logits: `[*batch, classes]`.
        teacher_logits: the same shape; constant, its gradient is 0.
        labels: `[*batch]`, the class of each example; one outside `0 .. classes - 1` is an error.
        alpha: weight of the target part (TCKD), ≥ 0.
        beta: weight of the non-target part (NCKD), ≥ 0. With β = 1 − q_y an example the loss is α = 1 plain KL.
        temperature: T > 0.
        where: `[*batch]`, False for examples that count for nothing.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. 0 where student and teacher agree, never below.

    Raises:
        ValueError: a temperature that is not positive, a negative weight, fewer than 2 classes, an unknown reduction.
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
    student, teacher, labels = keep(where, *widen(student_logits, teacher_logits), labels)
    check_classes(student)
    alpha, beta = non_negative("alpha", alpha, student), non_negative("beta", beta, student)
    temperature = positive("temperature", temperature, student)
    labels = valid_index("labels", labels, student.shape[-1])
    student_binary, student_others = _binary_and_others(student, labels, temperature)
    teacher_binary, teacher_others = _binary_and_others(teacher.detach(), labels, temperature)
    target = kl_divergence(student_binary, teacher_binary, 1.0)
    others = kl_divergence(student_others, teacher_others, temperature)
    return reduce(temperature**2 * (alpha * target + beta * others), where, reduction)


def _binary_and_others(x: Tensor, labels: Tensor, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """Logits, at temperature 1, of (the label, any other class); and x without the label."""
    x = x - x.detach().amax(-1, keepdim=True)
    others = without_class(x, labels)
    return torch.stack([take_class(x, labels) / temperature, log_sum_exp(others, temperature)], -1), others
