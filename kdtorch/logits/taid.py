"""TAID: KL divergence to a target that moves from the student to the teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._numerics import (
    check_classes,
    fraction,
    less_log1p,
    of_largest,
    scalar,
    softmax,
    without_common_error,
)
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked


@checked
def taid_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    interpolation: Scalar,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Temporally adaptive interpolated distillation: KL divergence to a target between the student and the teacher.

    $$\mathrm{KL}(m\,\|\,p),\qquad m=\mathrm{softmax}\big((1-\lambda)\bar s+\lambda t\big),\quad p=\mathrm{softmax}(s)$$

    where $\bar s$ are the student's logits, held constant.

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        interpolation: λ from 0 to 1, the position of the target between the student (0) and the teacher (1). It has no
            default: increase it during the training.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is never negative. It is 0 if student and teacher agree, and
        always for λ = 0. For λ = 1 it is `kl_loss` at temperature 1, and inf if the student gives -inf to a class that
        the teacher uses. For λ between 0 and 1, a class at -inf in either has probability 0 in the target.

    Raises:
        ValueError: an interpolation that is not between 0 and 1, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Shing, Misaki, Bao, Yokoi, Akiba, *TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
    Transfer in Language Models*, ICLR 2025, https://arxiv.org/abs/2501.16937. The released code returns the
    cross-entropy of target and student, which has the same gradient p - m and is larger by the target's entropy. That
    entropy changes with λ and with the student, so the released value does not show whether the student follows the
    target. The released code adapts λ to that value; with this function you choose the schedule of λ yourself.

    >>> import torch
    >>> from kdtorch import taid_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{taid_loss(s, t, interpolation=0.5):.4f}")
    0.0803
    """
    check_classes(student_logits)
    interpolation = fraction("interpolation", interpolation, student_logits, teacher_logits)
    return reduce(_taid(student_logits, teacher_logits, interpolation, where=where), where, reduction, group)


def taid_and_gradient(x: Tensor, y: Tensor, interpolation: Scalar) -> tuple[Tensor, Tensor]:
    """KL(m || p), and its gradient p - m, where m is a constant.

    log(p / m) is computed from λ (x - y), so that it keeps its digits if λ is small, or if x and y are close.
    """
    share = scalar(interpolation, x)
    p, own = softmax(x), x.detach()
    lowest, teacher_lowest = own.isneginf(), y.isneginf()
    gap = torch.where(lowest | teacher_lowest, 0, own) - torch.where(lowest | teacher_lowest, 0, y)
    # exact at λ = 0 and at λ = 1; 0 times -inf counts as 0
    mixed = torch.where(share < 0.5, own - share * gap, y + (1 - share) * gap)
    absent = (lowest & (share < 1)) | (teacher_lowest & (share > 0))
    empty = teacher_lowest.all(-1, keepdim=True)  # not a distribution, even with weight 0
    m = softmax(torch.where(empty, math.nan, torch.where(absent, -math.inf, mixed)))
    # log(p / m), from the difference of the rows relative to the target's largest class, which keeps its digits
    still = torch.where(lowest, 0, x) - torch.where(lowest, 0, own)  # 0, but with the derivative of x
    apart = share * (gap - of_largest(m.p, gap)) + (of_largest(m.p, own) - p.peak) + still
    apart = torch.where(lowest & ~absent, -math.inf, torch.where(absent & ~lowest, math.inf, apart))
    ratio, close = without_common_error(m.p, apart - (p.log_total - m.log_total))
    ratio = torch.where(m.p == 0, 0, ratio)
    near = ratio.abs() < 1
    growth = torch.where(near, ratio, 0).expm1()
    difference = torch.where(close, m.p * growth, p.p - m.p)
    terms = torch.where(near & (m.p > 0), m.p * less_log1p(growth), difference - m.p * ratio)
    return terms.sum(-1).clamp(min=0), difference


_taid = rowwise(taid_and_gradient)
