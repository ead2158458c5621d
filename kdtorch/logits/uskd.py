"""Universal self-knowledge distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import all_sum
from kdtorch._numerics import (
    check_classes,
    cross_entropy,
    non_negative,
    promote,
    rowwise,
    softmax,
    times,
    valid_index,
    weigh,
)
from kdtorch._reduce import reduce, zero_masked
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked


@checked(learns=("student_logits", "weak_logits"))
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
    group: ProcessGroup | None = None,
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
        group: the process group that the batch is spread over; the mean over ranks of what they return, and of their
            gradients, is then that of the whole batch.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a negative weight, fewer than 2 classes, an unknown reduction.
        IndexError: a label outside `0 .. classes - 1`.
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
    student, weak = zero_masked(where, *promote(student_logits, weak_logits))
    check_classes(student)
    alpha, beta = non_negative("alpha", alpha, student), non_negative("beta", beta, student)
    mu = non_negative("mu", mu, student)
    unused = torch.maximum(student, weak).isneginf().to(student.dtype)
    p, w = softmax(student.detach()), softmax(weak.detach()).p
    log_p = student.detach() - p.peak - p.log_total

    if labels.ndim < student.ndim:
        (labels,) = zero_masked(where, labels)
        classes = valid_index("labels", labels, student.shape[-1]).unsqueeze(-1)
        probabilities = torch.ones_like(student[..., :1])
        distribution = torch.zeros_like(student).scatter(-1, classes, probabilities)
    else:
        (distribution,) = zero_masked(where, labels.to(student.dtype))
        first = distribution.argmax(-1, keepdim=True)
        second = distribution.scatter(-1, first, -math.inf).argmax(-1, keepdim=True)
        classes = torch.cat([first, second], -1)
        probabilities = distribution.gather(-1, classes)
        classes = torch.where(probabilities > 0, classes, first)  # a second label of probability 0 is the first again

    present = probabilities > 0
    counted = present if where is None else present & where.unsqueeze(-1)
    log_p_labels = torch.where(present, log_p.gather(-1, classes), 0)
    square = torch.where(counted, (2 * log_p_labels).exp(), 0)
    examples = tuple(range(student.ndim - 1))
    number = all_sum(counted.sum(examples, dtype=square.dtype), group).clamp(min=1)
    mean = all_sum(square.sum(examples), group) / number
    soft = torch.where(present, square + probabilities - mean, 0)

    over_w = 1 - torch.where(present, w.gather(-1, classes), 0).sum(-1, keepdim=True) + 1e-6
    over_p = 1 - log_p_labels.sum(-1, keepdim=True) + 1e-6
    zipf = _zipf(w / over_w + log_p / over_p).scatter(-1, classes, 0) * (1 - unused)
    zipf = zipf / zipf.sum(-1, keepdim=True).clamp(min=torch.finfo(zipf.dtype).tiny)
    smooth = (0.9 * distribution + 0.1 / (1 - unused).sum(-1, keepdim=True)) * (1 - unused)
    value = _target_and_others(student, classes, soft, zipf, alpha, beta) + weigh(mu, cross_entropy(weak, smooth, 1.0))
    return reduce(value, where, reduction, group)


@rowwise
def _target_and_others(
    x: Tensor, classes: Tensor, soft: Tensor, zipf: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """-a sum P_y log p_y - b sum z log ^p, of which the gradient is a (p sum P - P) + b (^p sum z - z)."""
    p, x_others = softmax(x), x.scatter(-1, classes, -math.inf)
    target = -times(soft, x.gather(-1, classes) - p.peak - p.log_total).sum(-1, keepdim=True)
    hat_p, total = softmax(x_others), zipf.sum(-1, keepdim=True)
    others = hat_p.log_total * total - times(zipf, x_others - hat_p.peak).sum(-1, keepdim=True)
    gradient = alpha * soft.sum(-1, keepdim=True) * p.p + beta * (hat_p.p * total - zipf)
    return (weigh(alpha, target) + weigh(beta, others)).squeeze(-1), gradient.scatter_add(-1, classes, -alpha * soft)


def _zipf(score: Tensor) -> Tensor:
    """1 / the place of each class, 1 for the largest score; equal scores in the order of the classes."""
    bits = (0 - score).view(torch.int64 if score.dtype == torch.float64 else torch.int32)
    keys = bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(bits.dtype).max)  # in the order of -score
    order = keys.argsort(dim=-1, stable=True)
    weight = 1 / torch.arange(1, score.shape[-1] + 1, dtype=score.dtype, device=score.device)
    return torch.zeros_like(score).scatter(-1, order, weight.expand_as(score))
