"""Hierarchical context loss, the loss of ReviewKD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._numerics import promote
from kdtorch._reduce import reduce, zero_masked
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked


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
    r"""Hierarchical context loss: feature maps compared whole and pooled to 4×4, 2×2 and 1×1, summed over maps.

    $$\sum_{\text{maps}}\frac{\sum_l w_l\,\mathrm{MSE}\big(\mathrm{pool}_l(s),\mathrm{pool}_l(t)\big)}{\sum_l w_l},
    \qquad w=1,\tfrac12,\tfrac14,\tfrac18$$

    The full map weighs 1; a pooled level that is not smaller than the map's height is dropped, and the weights of
    those that remain are halved in turn. The MSE is over channels and positions.

    Args:
        student_maps: maps `[batch, channels, height, width]`, any number of them, of any sizes.
        teacher_maps: as many, of the same shapes; constant, their gradient is 0.
        channel_axis: where the channels are, 1 here (-1 in kdjax).
        where: `[batch]`, False for examples that count for nothing.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"`.
        group: the process group that the batch is spread over; the mean over ranks of what they return, and of their
            gradients, is then that of the whole batch.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers or shapes of maps that differ, a channel axis other than 1, 2, 3 or its negative,
            an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point arrays.

    Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021, https://arxiv.org/abs/2104.09044. The
    released code stops at the shorter of two lists of maps; the value is the same.

    >>> import torch
    >>> from kdtorch import hcl_loss
    >>> s, t = torch.ones((2, 3, 8, 8)), torch.zeros((2, 3, 8, 8))
    >>> print(f"{hcl_loss([s], [t]):.4f}")
    1.0000
    """
    if not student_maps or len(student_maps) != len(teacher_maps):
        raise ValueError(
            "`student_maps` and `teacher_maps` must hold the same number of maps, at least one, got "
            f"{len(student_maps)} and {len(teacher_maps)}; take the teacher's maps that the student's stand for"
        )
    if channel_axis not in (-3, -2, -1, 1, 2, 3):
        raise ValueError(f"`channel_axis` must be one of -3, -2, -1, 1, 2, 3, got {channel_axis}")
    for i, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"`student_maps[{i}]` and `teacher_maps[{i}]` must have the same shape, got {list(student.shape)} "
                f"and {list(teacher.shape)}; {_mend(student, teacher)}"
            )
    maps = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student, teacher = zero_masked(where, *promote(student, teacher))
        maps.append(_one_map(student, teacher, channel_axis))
    return reduce(torch.stack(maps).sum(0), where, reduction, group)


def _mend(student: Tensor, teacher: Tensor) -> str:
    if sorted(student.shape) == sorted(teacher.shape):
        return "bring both to one order of the axes, and say where the channels are by `channel_axis`"
    return "ReviewKD's connectors bring a student's maps to the teacher's shapes"


def _one_map(student: Tensor, teacher: Tensor, channel_axis: int) -> Tensor:
    student, teacher = (x.movedim(channel_axis, 1) for x in (student, teacher.detach()))
    batch, channels, height, width = student.shape
    sizes = [size for size in (4, 2, 1) if size < height]
    scaled = [
        math.sqrt(0.5**level * height * width)
        / size
        * torch.kron(_pooling(size, height, student), _pooling(size, width, student))
        for level, size in enumerate(sizes, 1)
    ]
    pools = torch.cat([student.new_empty(0, height * width), *scaled]).expand(max(batch, 1), -1, -1)
    weights = 2 - 0.5 ** len(sizes)
    return _squares(student.flatten(1), teacher.flatten(1), pools) / (channels * height * width * weights)


@rowwise
def _squares(x: Tensor, y: Tensor, pools: Tensor) -> tuple[Tensor, Tensor]:
    """|d|^2 + |K d|^2 with d = x - y and K the pooling, a row a bin; pooling is linear, so the difference is pooled."""
    difference, pool = x - y, pools[0]
    pooled = difference.unflatten(-1, (-1, pool.shape[-1])) @ pool.T
    value = torch.linalg.vecdot(difference, difference) + pooled.square().sum((-2, -1))
    return value, 2 * (difference + (pooled @ pool).flatten(-2))


def _pooling(bins: int, length: int, like: Tensor) -> Tensor:
    """The matrix that averages `length` positions into `bins`, which overlap where the length is no multiple."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    return functional.adaptive_avg_pool1d(eye, bins).T
