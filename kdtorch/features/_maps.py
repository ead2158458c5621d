"""What the losses of feature maps share: the check of the lists, and maps of different sizes pooled alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._typing import sizes

PROJECTOR = (
    "`Projector` in `nn` brings a student's map to the teacher's channels; resize it to the same height and width"
)


def check_channel_axis(channel_axis: int) -> None:
    if channel_axis not in (-3, -2, -1, 1, 2, 3):
        raise ValueError(f"`channel_axis` must be one of -3, -2, -1, 1, 2, 3, got {channel_axis}")


def check_maps(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], channel_axis: int) -> None:
    """Refuse no maps, lists of different lengths and an axis that cannot be the channels'."""
    if not student_maps or len(student_maps) != len(teacher_maps):
        raise ValueError(
            "`student_maps` and `teacher_maps` must hold the same number of maps, at least one, got "
            f"{len(student_maps)} and {len(teacher_maps)}; take the teacher's maps that the student's stand for"
        )
    check_channel_axis(channel_axis)


def check_shapes(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], projection: str) -> None:
    """Refuse maps whose shapes differ; `projection` says what brings one to the other's."""
    for i, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        check_shape(f"student_maps[{i}]", student, f"teacher_maps[{i}]", teacher, projection)


def check_shape(student_name: str, student: Tensor, teacher_name: str, teacher: Tensor, projection: str) -> None:
    """The same of one map."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"`{student_name}` and `{teacher_name}` must have the same shape, got {sizes(student)} "
            f"and {sizes(teacher)}; {mend(student, teacher, projection)}"
        )


def mend(student: Tensor, teacher: Tensor, projection: str) -> str:
    if sorted(sizes(student)) == sorted(sizes(teacher)):
        return "bring both to one order of the axes, and say where the channels are by `channel_axis`"
    return projection


def by_channels(x: Tensor, channel_axis: int) -> Tensor:
    """A map as `[batch, channels, positions]`."""
    return x.movedim(channel_axis, 1).flatten(2)


def pooled_alike(student_map: Tensor, teacher_map: Tensor, channel_axis: int = 1) -> tuple[Tensor, Tensor]:
    """Both as `[batch, channels, height, width]`, averaged to the smaller height and to the smaller width."""
    student, teacher = (x.movedim(channel_axis, 1) for x in (student_map, teacher_map))
    height, width = map(min, student.shape[2:], teacher.shape[2:])
    return pooled(student, height, width), pooled(teacher, height, width)


def pooled(x: Tensor, height: int, width: int) -> Tensor:
    """A map `[batch, channels, height, width]` averaged to a height and a width."""
    if x.shape[2] != height:
        x = (x.mT @ pooling(height, x.shape[2], x).T).mT
    if x.shape[3] != width:
        x = x @ pooling(width, x.shape[3], x).T
    return x


def spread(gradient: Tensor, height: int, width: int) -> Tensor:
    """The gradient with respect to a map of a height and a width, given that with respect to the pooled map."""
    if gradient.shape[2] != height:
        gradient = (gradient.mT @ pooling(gradient.shape[2], height, gradient)).mT
    if gradient.shape[3] != width:
        gradient = gradient @ pooling(gradient.shape[3], width, gradient)
    return gradient


def pooling(bins: int, length: int, like: Tensor) -> Tensor:
    """The matrix that averages `length` positions into `bins`, which overlap where the length is no multiple."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    return functional.adaptive_avg_pool1d(eye, bins).T
