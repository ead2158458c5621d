"""KL divergence to a mixture of the two distributions: DistiLLM's skewed divergences."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import (
    check_classes,
    close_log_ratio,
    fraction,
    less_log1p,
    of_largest,
    scalar,
    through_softmax,
)
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked


@checked
def skew_kl_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    skew: Scalar = 0.1,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Skewed KL divergence: from the teacher to a mixture of the teacher and the student.

    $$\mathrm{KL}\big(q\,\|\,kq+(1-k)p\big),\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        skew: k from 0 to 1, the teacher's part of the mixture. At 0 the loss is `kl_loss` at temperature 1, at 1 it is 0.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree, never negative, and at
        most -log k, even if the student gives -inf to a class that the teacher uses. With k = 0 it is then inf.

    Raises:
        ValueError: a skew that is not between 0 and 1, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Ko, Kim, Chen, Yun, *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
    https://arxiv.org/abs/2402.03898. The skew is the weight of the first argument of the divergence, which is the
    teacher in this function and the student in `skew_reverse_kl_loss`. The released code returns the cross-entropy of
    the teacher and the mixture, which has the same gradient and is larger by the teacher's entropy. There is no
    temperature, as in the paper: divide both logits by it, and multiply the loss by its square.

    >>> import torch
    >>> from kdtorch import skew_kl_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{skew_kl_loss(s, t):.4f}")
    0.3029
    """
    check_classes(student_logits)
    skew = fraction("skew", skew, student_logits, teacher_logits)
    return reduce(_skew_kl(student_logits, teacher_logits, skew, where=where), where, reduction, group)


@checked
def skew_reverse_kl_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    skew: Scalar = 0.1,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Skewed reverse KL divergence: from the student to a mixture of the student and the teacher.

    $$\mathrm{KL}\big(p\,\|\,kp+(1-k)q\big),\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        skew: k from 0 to 1, the student's part of the mixture. At 0 the loss is the reverse KL, at 1 it is 0.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree, never negative, and at
        most -log k, even if the teacher gives -inf to a class that the student uses. With k = 0 it is then inf, and the
        gradient leaves that class out.

    Raises:
        ValueError: a skew that is not between 0 and 1, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Ko, Kim, Chen, Yun, *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
    https://arxiv.org/abs/2402.03898. The skew is the weight of the first argument of the divergence, which is the
    student in this function and the teacher in `skew_kl_loss`.

    >>> import torch
    >>> from kdtorch import skew_reverse_kl_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{skew_reverse_kl_loss(s, t):.4f}")
    0.2637
    """
    check_classes(student_logits)
    skew = fraction("skew", skew, student_logits, teacher_logits)
    return reduce(_skew_reverse_kl(student_logits, teacher_logits, skew, where=where), where, reduction, group)


def skew_kl_and_gradient(x: Tensor, y: Tensor, skew: Scalar) -> tuple[Tensor, Tensor]:
    """KL(q || m) with m = k q + (1 - k) p, and its gradient p (h - sum p h) with h = -(1 - k) q / m.

    If the teacher gives the student's largest class nearly the same probability, 1 - k is added to h, which makes it
    small.
    """
    skew = scalar(skew, x)
    (p, *_), (q, *_), ratio = close_log_ratio(x, y)
    apart = of_largest(p, ratio) > 1
    ratio = torch.where(q == 0, 0, ratio)
    near, z = _growth(q, ratio, skew)
    taken = q * _log_odds(ratio, skew).sigmoid()  # (1 - k) p q / m
    given = torch.where(near, (1 - skew) * p * (z / (1 + z)), (1 - skew) * p - taken)
    return _kl_to_mixture(q, p, ratio, skew), through_softmax(torch.where(apart, -taken, given), p)


def skew_reverse_kl_and_gradient(x: Tensor, y: Tensor, skew: Scalar) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = k p + (1 - k) q, and its gradient p (h - sum p h) with h = log(p / m) - k p / m.

    A constant that makes h small is added to it: k if the teacher gives the student's largest class nearly the same
    probability, and 1 + log k if the teacher gives it nearly none.
    """
    skew = scalar(skew, x)
    (p, *_), (q, *_), ratio = close_log_ratio(x, y)
    apart = of_largest(p, ratio) > _log_odds(torch.zeros_like(skew), skew).clamp(min=1)
    ratio = torch.where(p == 0, 0, -ratio)
    near, z = _growth(p, ratio, skew)
    log_odds = _log_odds(ratio, skew)
    other = log_odds.sigmoid()  # (1 - k) q / m
    z = torch.where(z < 1, z, 0)
    agreeing = (skew - 1) * z / (1 + z) - less_log1p(-z / (1 + z))
    h = torch.where(near & (z != 0), agreeing, skew - 1 + other - _log_growth(ratio, skew))
    small = other < 0.25
    alone = torch.where(
        small, -less_log1p(-torch.where(small, other, 0)), other + torch.nn.functional.logsigmoid(-log_odds)
    )
    h = torch.where(apart, alone, h)
    return _kl_to_mixture(p, q, ratio, skew), through_softmax(p * torch.where(h.isposinf(), 0, h), p)


def _kl_to_mixture(q: Tensor, p: Tensor, ratio: Tensor, skew: Tensor) -> Tensor:
    """KL(q || m) with m = k q + (1 - k) p, given log(p / q). Its terms m - q - q log(m / q) are never negative."""
    near, z = _growth(q, ratio, skew)
    far = (1 - skew) * (p - q) - q * torch.where(q == 0, 0, _log_growth(ratio, skew))
    return torch.where(near, q * less_log1p(z), far).sum(-1).clamp(min=0)


def _growth(q: Tensor, ratio: Tensor, skew: Tensor) -> tuple[Tensor, Tensor]:
    """Where m / q - 1 with m = k q + (1 - k) p is finite and not close to -1, and its values there."""
    z = (1 - skew) * ratio.clamp(max=20).expm1()
    near = (q > 0) & (ratio < 20) & (z > -0.5)
    return near, torch.where(near, z, 0)


def _log_growth(ratio: Tensor, skew: Tensor) -> Tensor:
    """log(m / q) = log(k + (1 - k) p / q), computed without m, which could be 0."""
    return torch.logaddexp(skew.log(), (-skew).log1p() + ratio)


def _log_odds(ratio: Tensor, skew: Tensor) -> Tensor:
    """The logarithm of (1 - k) p / (k q), given log(p / q): infinite at k = 0 and at k = 1, and never NaN."""
    return (-skew).log1p() - skew.log() + ratio.clamp(-1e5, 1e5)


_skew_kl = rowwise(skew_kl_and_gradient)
_skew_reverse_kl = rowwise(skew_reverse_kl_and_gradient)
