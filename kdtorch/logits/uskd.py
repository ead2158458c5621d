"""Universal self-knowledge distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._numerics import (
    check_classes,
    cross_entropy,
    is_class,
    log_softmax,
    non_negative,
    softmax,
    take_class,
    valid_index,
    widen,
)
from kdtorch._reduce import count, keep, reduce
from kdtorch._typing import Bool, Float, Integer, Reduction, Scalar, checked


@checked
def uskd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    weak_logits: Float[Tensor, "*batch classes"],
    labels: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 0.1,
    mu: Scalar = 0.005,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Universal self-knowledge distillation: soft labels made without a teacher, from the student and a weak head.

    $$-\alpha\sum_y P_y\log p_y\;-\;\beta\sum_{k\ne y}z_k\log\hat p_k\;-\;\mu\sum_k\left(0.9\,l_k+\tfrac{0.1}{C}\right)\log w_k$$

    p = softmax(student_logits), w = softmax(weak_logits), l the label's distribution, y its classes, the hat a softmax
    over the classes other than y.

    - P_y = l_y + p_y² − the batch mean of p_y², constant.
    - z: classes are ranked by $w_k/(1-\sum_y w_y+10^{-6})+\log p_k/(1-\sum_y\log p_y+10^{-6})$, the largest first and
      the first of equals first; z_k is 1/place (Zipf's law), renormalised over the classes other than y, constant.

    Args:
        student_logits: `[*batch, classes]`.
        weak_logits: `[*batch, classes]`, of a linear head on an intermediate feature; the third term trains it.
        labels: `[*batch]`, the class of each example (one outside `0 .. classes - 1` is an error), or
            a distribution `[*batch, classes]` (mixup), whose two most probable classes are y; a second one of
            probability 0 is ignored, so that a one-hot distribution equals its class.
        alpha: weight of the target part, ≥ 0.
        beta: weight of the non-target part, ≥ 0.
        mu: weight of the weak head's own cross-entropy, ≥ 0.
        where: `[*batch]`, False for examples that count for nothing, in the batch mean too.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a negative weight, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023,
    https://arxiv.org/abs/2303.13005. The paper ranks by probabilities; the released code, followed here, takes the
    logarithm of the student's. A class at -inf in both logits is padding: it has no place, and C does not count it.

    >>> import torch
    >>> from kdtorch import uskd_loss
    >>> s, w = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{uskd_loss(s, w, torch.tensor([0])):.4f}")
    0.2453
    """
    student, weak = keep(where, *widen(student_logits, weak_logits))
    check_classes(student)
    alpha, beta = non_negative("alpha", alpha, student), non_negative("beta", beta, student)
    mu = non_negative("mu", mu, student)
    used = ~(torch.isneginf(student) & torch.isneginf(weak))
    log_p, w = log_softmax(student), softmax(weak.detach()).p

    if labels.ndim < student.ndim:
        (labels,) = keep(where, labels)
        labels = valid_index("labels", labels, student.shape[-1])
        distribution = is_class(student, labels).to(student.dtype)
        classes, probabilities = [labels], [torch.ones_like(student[..., 0])]
    else:
        (distribution,) = keep(where, labels.to(student.dtype))
        first = distribution.argmax(-1)
        second = torch.where(is_class(student, first), -math.inf, distribution).argmax(-1)
        classes = [first, second]
        probabilities = [take_class(distribution, first), take_class(distribution, second)]

    is_label = torch.zeros_like(student, dtype=torch.bool)
    target = log_p_labels = w_labels = torch.zeros_like(student[..., 0])
    for label, probability in zip(classes, probabilities, strict=True):
        present = probability > 0
        log_p_y = torch.where(present, take_class(log_p, label), 0)
        counted = present if where is None else present & where
        square = torch.where(counted, (2 * log_p_y).exp(), 0)
        mean = square.sum() / count(counted, square.dtype)
        soft = torch.where(present, square + probability - mean, 0).detach()
        target = target - soft * log_p_y
        log_p_labels = log_p_labels + log_p_y
        w_labels = w_labels + torch.where(present, take_class(w, label), 0)
        is_label = is_label | (is_class(student, label) & present.unsqueeze(-1))

    score = w / (1 - w_labels + 1e-6).unsqueeze(-1) + (log_p / (1 - log_p_labels + 1e-6).unsqueeze(-1)).detach()
    zipf = torch.where(used & ~is_label, _zipf(score), 0)
    zipf = zipf / zipf.sum(-1, keepdim=True).clamp(min=torch.finfo(zipf.dtype).tiny)
    others = cross_entropy(torch.where(is_label, -math.inf, student), zipf, 1.0)

    smooth = 0.9 * distribution + 0.1 / used.sum(-1, keepdim=True, dtype=student.dtype)
    head = cross_entropy(weak, torch.where(used, smooth, 0), 1.0)
    return reduce(alpha * target + beta * others + mu * head, where, reduction)


def _zipf(score: Tensor) -> Tensor:
    """1 / the place of each class, 1 for the largest score; equal scores in the order of the classes."""
    order = (-score).argsort(dim=-1, stable=True)
    weight = 1 / torch.arange(1, score.shape[-1] + 1, dtype=score.dtype, device=score.device)
    return torch.zeros_like(score).scatter(-1, order, weight.expand_as(score))
