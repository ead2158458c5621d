"""Reverse Kullback-Leibler divergence: the student against the teacher, as MiniLLM trains."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import (
    check_classes,
    far_apart,
    kl_of_softmaxes,
    kl_of_tilt,
    log_ratio,
    positive,
    pulled_back,
    quick_logs,
    softmax_pulled_back,
    tilt,
    times_square,
)
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked


@checked(dtensor="any")
def reverse_kl_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    class_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Knowledge distillation by the reverse KL divergence: the student puts no probability where the teacher has none.

    $$T^2\,\mathrm{KL}(p\,\|\,q),\qquad p=\mathrm{softmax}(s/T),\quad q=\mathrm{softmax}(t/T)$$

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        temperature: T > 0; a tensor has a gradient. The factor T² keeps the gradient's size as T grows.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.
        class_group: the process group that the classes are spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree, never negative, and
        inf where the teacher gives -inf to a class that the student uses; the gradient stays finite there. A class to
        which the student gives -inf adds nothing.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024, https://arxiv.org/abs/2306.08543.
    The paper samples from the student; the released codes of DistiLLM and torchtune sum over the vocabulary, as this
    function does, without a temperature. Both have a gradient of NaN if any logit is -inf.

    >>> import torch
    >>> from kdtorch import reverse_kl_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> print(f"{reverse_kl_loss(s, t, temperature=2.0):.4f}")
    0.3851
    """
    check_classes(student_logits, class_group, group)
    temperature = positive("temperature", temperature, student_logits, teacher_logits)
    divergence = reverse_kl_divergence(
        student_logits, teacher_logits, temperature, where=where, class_group=class_group
    )
    return reduce(times_square(temperature, divergence), where, reduction, group)


def reverse_kl_and_gradient(
    x: Tensor, y: Tensor, temperature: Scalar, class_group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """KL(p || q), and its gradient p (r - KL(p || q)) / T with r = log(p / q)."""
    tilted = tilt(y, x, temperature, class_group)  # q in terms of p, so d is -r minus its mean under p
    if tilted is not None:
        value = kl_of_tilt(tilted)
        return value, softmax_pulled_back(tilted.d, tilted.q).div_(-temperature)
    far = _of_logs(x, y, temperature, class_group)
    if far is not None:
        return far
    p, q, ratio = log_ratio(x, y, temperature, class_group=class_group)
    value, _ = kl_of_softmaxes(q, p, -ratio, class_group)
    return value, pulled_back(ratio, p.p, class_group) / temperature


def _of_logs(
    x: Tensor, y: Tensor, temperature: Scalar, class_group: ProcessGroup | None
) -> tuple[Tensor, Tensor] | None:
    """The same in few kernels, if `quick_logs` gives a result that is accurate."""
    logs = quick_logs(x, y, temperature, class_group)
    if logs is None:
        return None
    ratio = logs.log_p.sub_(logs.log_q)
    value = torch.linalg.vecdot(logs.p, ratio)
    if not far_apart(value):
        return None
    return value, softmax_pulled_back(ratio.sub_(value.unsqueeze(-1)), logs.p).div_(temperature)


reverse_kl_divergence = rowwise(reverse_kl_and_gradient)
