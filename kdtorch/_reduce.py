"""From one value an example to the answer, and how masked examples leave a computation."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from kdtorch._typing import Reduction


def keep(where: Tensor | None, *arrays: Tensor) -> tuple[Tensor, ...]:
    """Put zeros into the masked examples, so that nothing in them reaches a value or a gradient."""
    if where is None:
        return arrays
    return tuple(torch.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, 0) for x in arrays)


def reduce(values: Tensor, where: Tensor | None, reduction: Reduction) -> Tensor:
    """`"mean"`: the sum over kept examples by their number; `"sum"`; `"none"`: one value an example."""
    check_reduction(reduction)
    (values,) = keep(where, values)
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    return total / (max(values.numel(), 1) if where is None else count(where, values.dtype))


def count(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of kept examples, at least one."""
    return kept.sum(dtype=dtype).clamp(min=1)


def check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f'`reduction` must be one of "mean", "sum", "none", got {reduction!r}')
