"""Universal self-knowledge distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import all_sum
from kdtorch._numerics import (
    Softmax,
    check_classes,
    cross_entropy_and_gradient,
    cross_entropy_of_softmax,
    non_negative,
    softmax,
    valid_index,
    weigh,
    widest,
)
from kdtorch._reduce import reduce, zero_masked
from kdtorch._rowwise import by_rows, rowwise
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
    r"""Universal self-knowledge distillation: soft labels without a teacher, from the student and a weak head.

    $$-\alpha\sum_y P_y\log p_y\;-\;\beta\sum_{k\ne y}z_k\log\hat p_k\;-\;\mu\sum_k\left(0.9\,l_k+\tfrac{0.1}{C}\right)\log w_k$$

    p = softmax(student_logits), w = softmax(weak_logits), l the label's distribution, y its classes, the hat a softmax
    over the classes other than y.

    - P_y = l_y + p_y² − the batch mean of p_y², constant.
    - z: the classes are ranked by $w_k/(1-\sum_y w_y+10^{-6})+\log p_k/(1-\sum_y\log p_y+10^{-6})$, the largest first,
      and equal ones in the order of the classes; z_k is 1/place (Zipf's law), normalised over the classes other than y,
      and constant.

    Args:
        student_logits: `[*batch, classes]`.
        weak_logits: `[*batch, classes]`, of a linear head on an intermediate feature; the third term trains it.
        labels: `[*batch]`, the class of each example (one outside `0 .. classes - 1` is an error), or
            a distribution `[*batch, classes]` (mixup), whose two most probable classes are y; a second one of
            probability 0 is ignored, so that a one-hot distribution equals its class.
        alpha: weight of the target part, ≥ 0; a constant.
        beta: weight of the non-target part, ≥ 0; a constant.
        mu: weight of the weak head's own cross-entropy, ≥ 0; a constant.
        where: `[*batch]`, False for examples that are left out, also of the batch mean.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a negative weight, fewer than 2 classes, an unknown reduction.
        IndexError: a label outside `0 .. classes - 1`.
        TypeError: a shape or dtype that does not fit.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023,
    https://arxiv.org/abs/2303.13005. The paper ranks by probabilities; the released code, which this function follows,
    uses the logarithm of the student's. A class at -inf in both logits is padding: it is not ranked, and C does not
    count it.

    >>> import torch
    >>> from kdtorch import uskd_loss
    >>> s, w = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{uskd_loss(s, w, torch.tensor([0])):.4f}")
    0.2453
    """
    check_classes(student_logits)
    logits = student_logits, weak_logits
    alpha, beta = non_negative("alpha", alpha, *logits), non_negative("beta", beta, *logits)
    mu = non_negative("mu", mu, *logits)

    (kept,) = zero_masked(where, labels)
    if labels.ndim < student_logits.ndim:
        labels = valid_index("labels", kept, student_logits.shape[-1])
        classes = labels.unsqueeze(-1)
        probabilities = torch.ones_like(classes, dtype=widest(*logits))
    else:
        first = kept.argmax(-1, keepdim=True)
        second = kept.scatter(-1, first, -math.inf).argmax(-1, keepdim=True)
        classes = torch.cat([first, second], -1)
        probabilities = kept.gather(-1, classes).to(widest(*logits))
        classes = torch.where(
            probabilities > 0, classes, first
        )  # a second label of probability 0 is replaced by the first

    (log_p,) = by_rows(_log_p, where, student_logits.detach(), classes)
    present = probabilities > 0
    counted = (present if where is None else present & where.unsqueeze(-1)) & ~log_p.isnan()
    square = torch.where(present, (2 * log_p).exp(), 0)
    examples = tuple(range(square.ndim - 1))
    number = all_sum(counted.sum(examples, dtype=square.dtype), group).clamp(min=1)
    mean = all_sum(torch.where(counted, square, 0).sum(examples), group) / number
    soft = torch.where(present, square + probabilities - mean, 0)

    value = _target_and_others(*logits, classes, probabilities, soft, alpha, beta, where=where)
    head = _head(*logits[::-1], labels, where=where)
    return reduce(value + weigh(mu, head), where, reduction, group)


def _log_p(x: Tensor, classes: Tensor) -> tuple[Tensor]:
    p = softmax(x)
    return (x.gather(-1, classes) - p.peak - p.log_total,)


def target_and_others_and_gradient(
    x: Tensor, weak: Tensor, classes: Tensor, probabilities: Tensor, soft: Tensor, alpha: Scalar, beta: Scalar
) -> tuple[Tensor, Tensor]:
    """-a sum P_y log p_y - b sum z log ^p, and its gradient a (p sum P - P) + b (^p sum z - z).

    The gradient is written by hand and shares softmaxes with the value, for the speed and memory in
    docs/performance.md.
    """
    p = softmax(x)
    log_p = x - p.peak - p.log_total
    zipf = _zipf(log_p.detach(), softmax(weak.detach()), torch.maximum(x, weak).isneginf(), classes, probabilities)
    log_p_y = log_p.gather(-1, classes)
    target = -torch.where(soft == 0, 0, soft * log_p_y).sum(-1)
    hat_p = softmax(x.scatter(-1, classes, -math.inf), may_be_empty=True)
    others, gradient = cross_entropy_of_softmax(hat_p, x, zipf, 1.0)
    gradient = alpha * soft.sum(-1, keepdim=True) * p.p + beta * gradient
    return weigh(alpha, target) + weigh(beta, others), gradient.scatter_add_(-1, classes, -alpha * soft)


_target_and_others = rowwise(target_and_others_and_gradient)


def _zipf(log_p: Tensor, w: Softmax, unused: Tensor, classes: Tensor, probabilities: Tensor) -> Tensor:
    """z: 1 / the rank of each class by its score, 0 for labels and padding, normalised to sum 1."""
    present = probabilities > 0
    over_w, over_p = (
        1 - torch.where(present, x.gather(-1, classes), 0).sum(-1, keepdim=True) + 1e-6 for x in (w.p, log_p)
    )
    zipf = _inverse_places(w.p / over_w + log_p / over_p)
    zipf = zipf.scatter(-1, classes, 0).masked_fill(unused, 0)
    felt = 0 * w.log_total  # carries a NaN, which the ranks do not show
    return zipf / (zipf.sum(-1, keepdim=True).clamp(min=torch.finfo(zipf.dtype).tiny) + felt)


def _inverse_places(score: Tensor) -> Tensor:
    """1 / the rank of each class, 1 for the largest score; equal scores are ranked in the order of the classes."""
    bits = (0 - score).view(torch.int64 if score.dtype == torch.float64 else torch.int32)
    keys = bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(bits.dtype).max)  # in the order of -score
    order = keys.argsort(dim=-1, stable=True)
    weight = 1 / torch.arange(1, score.shape[-1] + 1, dtype=score.dtype, device=score.device)
    return torch.zeros_like(score).scatter(-1, order, weight.expand_as(score))


def head_and_gradient(weak: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-sum (0.9 l + 0.1 / C) log softmax(weak), over the classes that are not padding."""
    used = torch.maximum(x, weak).isneginf().logical_not().to(weak.dtype)
    distribution = labels
    if labels.ndim < weak.ndim:
        distribution = torch.zeros_like(weak).scatter(-1, labels.unsqueeze(-1), 1)
    number = used.sum(-1, keepdim=True) + 0 * x.detach().amax(-1, keepdim=True)  # NaN if x is all -inf
    return cross_entropy_and_gradient(weak, (0.9 * distribution + 0.1 / number) * used)


_head = rowwise(head_and_gradient)
