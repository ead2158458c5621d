"""Reductions, and the removal of masked examples from a computation."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from kdtorch._collectives import all_sum, check_batch, size
from kdtorch._numerics import own
from kdtorch._typing import ProcessGroup, Reduction

_REDUCTIONS = get_args(Reduction)


def zero_masked(where: Tensor | None, *arrays: Tensor) -> tuple[Tensor, ...]:
    """Set masked examples to zero, so that their contents reach neither a value nor a gradient."""
    return arrays if where is None else zeroed(own(where), *arrays)  # autograd stores the mask


def zeroed(where: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
    """The same without a copy of the mask, for use where autograd stores nothing."""
    return tuple(torch.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, _zero(x)) for x in arrays)


def _zero(x: Tensor) -> bool | int:
    return False if x.dtype == torch.bool else 0


def reduce(values: Tensor, where: Tensor | None, reduction: Reduction, group: ProcessGroup | None = None) -> Tensor:
    """`"mean"`: the sum over kept examples divided by their number; `"sum"`; `"none"`: one value per example.

    With several ranks, the mean of what they return is the result for the whole batch.
    """
    check_reduction(reduction)
    (values,) = zero_masked(where, values)
    if reduction == "none":
        return values
    check_batch(values, group)
    return reduce_sum(values.sum(), values.numel(), where, reduction, group)


def reduce_sum(
    value: Tensor, number: int, where: Tensor | None, reduction: Reduction, group: ProcessGroup | None = None
) -> Tensor:
    """The `"mean"` or `"sum"` of `number` examples, from the sum over those that are kept."""
    ranks = size(group)
    if reduction == "sum":
        return value * ranks
    return value / (max(number, 1) if where is None else count(own(where), value.dtype, group) / ranks)


def weighted_mean(value: Tensor, weights: Tensor, where: Tensor | None, group: ProcessGroup | None = None) -> Tensor:
    """The weighted mean over kept examples, given their weighted sum; the divisor is 1 if the weights sum to 0."""
    weights = weights.detach().to(value.dtype)
    (weights,) = (weights,) if where is None else zeroed(where, weights)
    total = all_sum(weights.sum(), group)
    return value / (torch.where(total == 0, 1, total) / size(group))


def count(kept: Tensor, dtype: torch.dtype, group: ProcessGroup | None = None) -> Tensor:
    """The number of kept examples on all ranks, at least one."""
    return all_sum(kept.sum(dtype=dtype), group).clamp(min=1)


def check_reduction(reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f'`reduction` must be one of "mean", "sum", "none", got {reduction!r}')
