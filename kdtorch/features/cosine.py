"""Cosine distance: the student's feature in the direction of the teacher's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.features._maps import unit_and_length


@checked
def cosine_loss(
    student: Float[Tensor, "*batch features"],
    teacher: Float[Tensor, "*batch features"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Cosine distance between features: only their direction matters, not their length.

    $$1-\hat s\cdot\hat t,\qquad\hat s=s/\|s\|,\quad\hat t=t/\|t\|$$

    Args:
        student: `[*batch, features]`.
        teacher: the same shape; constant.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`: 0 for the same direction, 1 for a right angle, 2 for opposite
        directions. Where the student or the teacher is zero it is 1, with gradient 0.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Sanh et al., *DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter*, 2019,
    https://arxiv.org/abs/1910.01108, for hidden states. Liger's gradient at a zero feature is 10²⁰. The released codes
    subtract the cosine from 1, which loses the digits of a small distance.

    >>> import torch
    >>> from kdtorch import cosine_loss
    >>> s, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    >>> print(f"{cosine_loss(s, t):.4f}")
    0.4000
    """
    return reduce(_cosine(student, teacher, where=where), where, reduction, group)


def cosine_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """1 - u.v = |u - v|^2 / 2 for the unit rows u and v of x and y, and its gradient [(u - v) - (1 - u.v) u] / |x|."""
    (u, length), (v, other) = unit_and_length(x), unit_and_length(y)
    zero = ((u == 0).all(-1, keepdim=True).to(u.dtype) + (v == 0).all(-1, keepdim=True).to(u.dtype)) / 2
    difference = _difference(x, y, u, v, length, other)
    value = difference.square().sum(-1) / 2 + zero.squeeze(-1)
    return value, (difference - value.unsqueeze(-1) * u) / torch.where(zero > 0, math.inf, length)


def _difference(x: Tensor, y: Tensor, u: Tensor, v: Tensor, length: Tensor, other: Tensor) -> Tensor:
    """u - v, computed from x - y if x and y have similar lengths, so that close rows keep their digits."""
    near = (other > length / 2) & (other < 2 * length)
    ratio = torch.where(near, other, 1) / torch.where(near, length, 1)
    step = torch.where(near, x - y, 0) / length
    longer = (step * (u + ratio * v)).sum(-1, keepdim=True) / (1 + ratio)  # 1 - ratio
    return torch.where(near, step - longer * v, u - v)


_cosine = rowwise(cosine_and_gradient)
