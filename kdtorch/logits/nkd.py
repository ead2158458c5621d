"""Normalised knowledge distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import (
    check_classes,
    cross_entropy_of_softmax,
    non_negative,
    positive,
    softmax,
    valid_index,
    weigh,
    without_class,
)
from kdtorch._reduce import reduce, zero_masked
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked


@checked(dtensor="rows")
def nkd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    labels: Integer[Tensor, "*batch"] | Float[Tensor, "*batch classes"],
    *,
    gamma: Scalar = 1.5,
    temperature: Scalar = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Normalised knowledge distillation: cross-entropies on the label and on the normalised other classes.

    $$-q_y\log p_y-\gamma\,T^2\sum_{k\ne y}\hat q_k\log\hat p_k$$

    p and q are the softmaxes of student and teacher at temperature 1; hats are softmaxes over the classes other than
    the label y at temperature T. These are cross-entropies, so the loss is not 0 if student and teacher are equal.

    Args:
        student_logits: `[*batch, classes]`.
        teacher_logits: the same shape; constant.
        labels: `[*batch]`, the class of each example (one outside `0 .. classes - 1` is an error), or a distribution
            `[*batch, classes]`, of which the most probable class is used, the first of equally probable ones.
        gamma: weight of the non-target part, ≥ 0; a constant.
        temperature: T > 0, of the non-target part alone; a tensor has a gradient.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a temperature that is not positive, a negative weight, fewer than 2 classes, an unknown reduction.
        IndexError: a label outside `0 .. classes - 1`.
        TypeError: a shape or dtype that does not fit.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023,
    https://arxiv.org/abs/2303.13005. Revisions of the released code hide the label by subtracting 1000, remove it, or
    leave it in by mistake; this function masks it.

    >>> import torch
    >>> from kdtorch import nkd_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{nkd_loss(s, t, torch.tensor([0])):.4f}")
    0.7282
    """
    check_classes(student_logits)
    logits = student_logits, teacher_logits
    gamma, temperature = non_negative("gamma", gamma, *logits), positive("temperature", temperature, *logits)
    (labels,) = zero_masked(where, labels if labels.ndim < student_logits.ndim else labels.argmax(-1))
    labels = valid_index("labels", labels, student_logits.shape[-1])
    return reduce(_normalized(*logits, labels, gamma, temperature, where=where), where, reduction, group)


def normalized_and_gradient(
    x: Tensor, y: Tensor, labels: Tensor, gamma: Scalar, temperature: Scalar
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient q_y (p - 1 at the label) + gamma T (^p - ^q).

    The gradient is written by hand and shares softmaxes with the value, for the speed and memory in
    docs/performance.md.
    """
    label = labels.unsqueeze(-1)
    p, q_y = softmax(x), softmax(y).p.gather(-1, label)
    log_p_y = x.gather(-1, label) - p.peak - p.log_total
    target = -torch.where(q_y == 0, 0 * p.log_total, q_y * log_p_y).squeeze(-1)
    hat_p, hat_q = (softmax(without_class(a, labels), temperature, may_be_empty=True) for a in (x, y))
    others, gradient = cross_entropy_of_softmax(hat_p, x, hat_q.p, temperature)
    weight = gamma * temperature**2
    return target + weigh(weight, others), (q_y * p.p + weight * gradient).scatter_add_(-1, label, -q_y)


_normalized = rowwise(normalized_and_gradient)
