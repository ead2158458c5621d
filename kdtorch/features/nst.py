"""Neuron selectivity transfer: the distribution of the channels over positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.features._maps import (
    across,
    are_equal,
    check_maps,
    ordered,
    pooled,
    smaller,
    spread,
    unit_and_length,
    unless,
)


@checked
def nst_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    *,
    channel_axis: int = 1,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Neuron selectivity transfer: the distribution of the channels over positions should match the teacher's.

    $$\sum_{\text{maps}}\left\|\frac{UU^\top}{C_s}-\frac{VV^\top}{C_t}\right\|_F^2$$

    The columns of U are the student's channels over positions, each of unit length, and those of V the teacher's. It is
    the squared maximum mean discrepancy of the two sets of channels under the kernel $(u\cdot v)^2$. A channel of zeros is
    a column of zeros.

    Args:
        student_maps: maps `[batch, channels, height, width]`, any number of them, of any sizes.
        teacher_maps: as many, of any sizes and numbers of channels; constant. Two maps of different sizes are averaged
            first, to the smaller height and to the smaller width.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers of maps that differ, a channel axis other than 1, 2, 3 or its negative, an unknown
            reduction.
        TypeError: maps that are not a list of four-axis floating-point tensors.

    Huang and Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017,
    https://arxiv.org/abs/1707.01219. The released codes add and subtract three means of kernels.

    >>> import torch
    >>> from kdtorch import nst_loss
    >>> s, t = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0]]]])
    >>> print(f"{nst_loss([s], [t]):.4f}")
    2.0000
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    maps = [_nst(*ordered(channel_axis, *both), where=where) for both in zip(student_maps, teacher_maps, strict=True)]
    return reduce(torch.stack(maps).sum(0), where, reduction, group)


def nst_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """|U U' / C_s - V V' / C_t|^2, where the columns of U and V are the channels of x and y, and its gradient."""
    height, width = smaller(x, y)
    f, g = (pooled(z, height, width).flatten(2) for z in (x, y))
    (direction, length), (other, _) = unit_and_length(f), unit_and_length(g)
    root = math.sqrt(f.shape[1])
    value, pull = _products(direction / root, other / math.sqrt(g.shape[1]), are_equal(x, y))
    gradient = across(direction, length, pull * (4 / root)).unflatten(2, (height, width))
    return value, spread(gradient, *x.shape[2:])


def _products(u: Tensor, v: Tensor, equal: Tensor | None) -> tuple[Tensor, Tensor]:
    """|M|^2 and M u, where M = u' u - v' v, for u and v `[batch, channels, positions]`.

    M is computed in blocks of rows; with many positions, a block is about as large as u.
    """
    positions = u.shape[2]
    number = -(-positions // max(u.shape[1], v.shape[1], 64))
    size = -(-positions // number)

    def block(start: int) -> tuple[Tensor, Tensor]:
        m, less = (x[:, :, start : start + size].mT @ x for x in (u, v))
        m = unless(equal, m - less)
        return m.square().sum((1, 2)), u @ m.mT

    values, parts = zip(*(block(i * size) for i in range(number)), strict=True)
    return torch.stack(values).sum(0), torch.cat(parts, 2)


_nst = rowwise(nst_and_gradient, axes=3)
