"""Universal logit distillation: compares distributions over different vocabularies in sorted order."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._numerics import check_classes, eager_on_cpu, softmax_pulled_back, softmaxes
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked


@checked
def uld_loss(
    student_logits: Float[Tensor, "*batch student_classes"],
    teacher_logits: Float[Tensor, "*batch teacher_classes"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Universal logit distillation (ULD): the sorted probabilities of student and teacher should match.

    $$\sum_k\left|p_{(k)}-q_{(k)}\right|,\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    where (k) is the k-th place in descending order, and the shorter of the two is padded with zeros. The loss ignores
    which class has which probability, so student and teacher may have different vocabularies.

    Args:
        student_logits: `[*batch, student_classes]`.
        teacher_logits: `[*batch, teacher_classes]`, of any number of classes; constant.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is between 0 and 2, and 0 where the teacher's classes are a
        permutation of the student's. A class at -inf has probability 0, so padding student or teacher with -inf changes
        nothing.

    Raises:
        ValueError: fewer than 2 classes on either side, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Boizard et al., *Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs*, TMLR 2025,
    https://arxiv.org/abs/2402.12030. The logits are sorted stably instead of the probabilities, because rounding may
    make probabilities equal. If the two probabilities at one place are equal, the gradient of their difference is 0.

    >>> import torch
    >>> from kdtorch import uld_loss
    >>> s = torch.tensor([[2.0, 0.0, -1.0]])
    >>> t = torch.tensor([[1.0, 0.0, 1.0, -1.0]])
    >>> print(f"{uld_loss(s, t):.4f}")
    0.8886
    """
    check_classes(student_logits)
    check_classes(teacher_logits)
    return reduce(_sorted_distance(student_logits, teacher_logits, where=where), where, reduction, group)


def uld_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """sum |p - q| of the sorted softmaxes, and its gradient p (h - sum p h), with h = sign(p - q) in the order of x."""
    order = _order(x)
    ours, theirs = x.gather(-1, order), _descending(y)
    places = max(x.shape[-1], y.shape[-1])
    ours, theirs = (functional.pad(z, (0, places - z.shape[-1]), value=-math.inf) for z in (ours, theirs))
    p, _, gap = softmaxes(ours, theirs)
    # rows that differ by a constant have equal softmaxes, but rounding makes them differ by this much
    gap = torch.where(gap.abs() <= torch.finfo(x.dtype).eps ** 1.5 * p, 0, gap)
    signs = gap.sign() + 0 * gap  # the sign of NaN is 0 in PyTorch
    signs = signs - signs[..., :1]  # no effect on the gradient, but fewer digits lost at a p of almost 1
    gradient = softmax_pulled_back(signs, p)[..., : x.shape[-1]]
    return gap.abs().sum(-1), torch.empty_like(x).scatter(-1, order, gradient)


def _descending(y: Tensor) -> Tensor:
    """y in descending order; on a CPU by NumPy, which takes a third of the time because it returns no indices."""
    if eager_on_cpu(y):
        return torch.from_numpy(np.sort(y.detach().numpy(), -1)).flip(-1)
    return y.sort(dim=-1, descending=True).values


def _order(x: Tensor) -> Tensor:
    """The indices that sort x in descending order, stably.

    On a CPU, integers are sorted whose ascending order is the descending order of x, each packed together with its
    position. No two of them are equal, so they need no stable sort, which takes twice the time.
    """
    if x.dtype != torch.float32 or not eager_on_cpu(x):
        return x.sort(dim=-1, descending=True, stable=True).indices
    bits = (x.detach() + 0).view(torch.int32)  # -0 becomes 0
    keys = ~torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits)
    beside = keys.long().bitwise_left_shift_(32).add_(torch.arange(x.shape[-1], device=x.device))
    return beside.sort(-1).values.bitwise_and_(2**32 - 1)


_sorted_distance = rowwise(uld_and_gradient)
