"""Hierarchical context loss, the loss of ReviewKD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdtorch._numerics import widest
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.features._maps import check_maps, check_shapes, pooling

_CONNECTORS = "ReviewKD's connectors map a student's maps to the teacher's shapes, with `out_channels` and `out_shapes`"


@checked
def hcl_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    *,
    channel_axis: int = 1,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Hierarchical context loss: compares feature maps at full size and pooled to 4×4, 2×2 and 1×1, summed over maps.

    $$\sum_{\text{maps}}\frac{\sum_l w_l\,\mathrm{MSE}\big(\mathrm{pool}_l(s),\mathrm{pool}_l(t)\big)}{\sum_l w_l},
    \qquad w=1,\tfrac12,\tfrac14,\tfrac18$$

    The full map has the weight 1. A pooled level that is not smaller than the map's height is dropped, and each of the
    remaining levels has half the weight of the one before. The MSE is over channels and positions.

    Args:
        student_maps: maps `[batch, channels, height, width]`, any number of them, of any sizes.
        teacher_maps: as many, of the same shapes; constant.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers or shapes of maps that differ, a channel axis other than 1, 2, 3 or its negative,
            an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point tensors.

    Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021, https://arxiv.org/abs/2104.09044. The
    released code stops at the shorter of two lists of maps; the value is the same.

    >>> import torch
    >>> from kdtorch import hcl_loss
    >>> s, t = torch.ones((2, 3, 8, 8)), torch.zeros((2, 3, 8, 8))
    >>> print(f"{hcl_loss([s], [t]):.4f}")
    1.0000
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    check_shapes(student_maps, teacher_maps, _CONNECTORS)
    maps = [_one_map(*both, channel_axis, where) for both in zip(student_maps, teacher_maps, strict=True)]
    return reduce(torch.stack(maps).sum(0), where, reduction, group)


def _one_map(student: Tensor, teacher: Tensor, channel_axis: int, where: Tensor | None) -> Tensor:
    student, teacher = (x.movedim(channel_axis, 1) for x in (student, teacher))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _squares(student, teacher, None, where=where)
    like = student.new_empty(student.shape[2:], dtype=widest(student, teacher))
    return _squares(
        student, teacher, [_pools(like)], where=where
    )  # in a list, so that it is not split into rows of examples


def squares_and_gradient(x: Tensor, y: Tensor, pools: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The weighted mean of |d|^2 and |K d|^2 for d = x - y and the linear pooling K, and its gradient."""
    difference, pool = (x - y).flatten(2), pools[0] if pools else _pools(x)
    pooled, number = difference @ pool.T, math.prod(x.shape[1:]) * (2 - 0.5 ** len(_sizes(x.shape[2])))
    value = difference.square().sum((1, 2)) + pooled.square().sum((1, 2))
    return value / number, (difference + pooled @ pool).mul_(2 / number).reshape(x.shape)


# Written by hand, so that value and gradient take one pass over blocks that fit into a CPU's caches, and nothing else
# is stored until the backward pass.
_squares = rowwise(squares_and_gradient, axes=3)


def _sizes(height: int) -> list[int]:
    return [size for size in (4, 2, 1) if size < height]


def _pools(like: Tensor) -> Tensor:
    """The matrix of all pools of a map `[..., height, width]`: one row per bin, times the root of the pool's weight."""
    height, width = like.shape[-2:]
    scaled = [
        math.sqrt(0.5**level * height * width)
        / size
        * torch.kron(pooling(size, height, like), pooling(size, width, like))
        for level, size in enumerate(_sizes(height), 1)
    ]
    return torch.cat([like.new_empty(0, height * width), *scaled])
