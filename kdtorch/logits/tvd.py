"""Total variation distance between student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import check_classes, difference_of_softmaxes, less_common_error, log_ratio, pulled_back
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked


@checked(dtensor="any")
def tvd_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Total variation distance: half the sum of the absolute differences of the probabilities.

    $$\tfrac12\sum_c|p_c-q_c|,\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`, from 0, where student and teacher agree, to 1, where no class
        is used by both. A logit of -inf is a probability of 0.

    Raises:
        ValueError: fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation*, ACL 2023,
    https://arxiv.org/abs/2307.15190. The gradient uses the sign of p - q, which is 0 for a class where the two agree up
    to rounding.

    >>> import torch
    >>> from kdtorch import tvd_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{tvd_loss(s, t):.4f}")
    0.3755
    """
    check_classes(student_logits)
    return reduce(_total_variation(student_logits, teacher_logits, where=where), where, reduction, group)


def tvd_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """sum |p - q| / 2, and its gradient p (h - sum p h) / 2 with h = sign(p - q).

    A class counts as a tie if p and q differ by no more than the rounding of their normalisers.
    """
    (p, *_), (q, *_), ratio = log_ratio(x, y, 1.0)
    difference, _ = less_common_error(difference_of_softmaxes(p, q, ratio), q)
    value = (difference.abs().sum(-1) / 2).clamp(max=1)
    tie = difference.abs() <= 8 * torch.finfo(q.dtype).eps * value.unsqueeze(-1) * q
    sign = torch.where(difference.isnan(), difference, difference.sign())  # PyTorch's sign of NaN is 0
    return value, pulled_back(torch.where(tie, 0, sign), p) / 2


_total_variation = rowwise(tvd_and_gradient)
