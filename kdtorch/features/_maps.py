"""Shared by the losses of feature maps: checks of the lists, and pooling of maps of different sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._numerics import eager_on_cpu
from kdtorch._typing import sizes

PROJECTOR = "`Projector` in `nn` maps a student's channels to the teacher's; resize it to the same height and width"


def check_channel_axis(channel_axis: int) -> None:
    if channel_axis not in (-3, -2, -1, 1, 2, 3):
        raise ValueError(f"`channel_axis` must be one of -3, -2, -1, 1, 2, 3, got {channel_axis}")


def check_maps(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], channel_axis: int) -> None:
    """Raise an error for empty lists, lists of different lengths, and an axis that cannot be the channels'."""
    if not student_maps or len(student_maps) != len(teacher_maps):
        raise ValueError(
            "`student_maps` and `teacher_maps` must hold the same number of maps, at least one, got "
            f"{len(student_maps)} and {len(teacher_maps)}; give only the teacher's maps that correspond to the student's"
        )
    check_channel_axis(channel_axis)


def check_shapes(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], projection: str) -> None:
    """Raise an error if the shapes of maps differ; `projection` says how to make them equal."""
    for i, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        check_shape(f"student_maps[{i}]", student, f"teacher_maps[{i}]", teacher, projection)


def check_shape(student_name: str, student: Tensor, teacher_name: str, teacher: Tensor, projection: str) -> None:
    """The same for one map."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"`{student_name}` and `{teacher_name}` must have the same shape, got {sizes(student)} "
            f"and {sizes(teacher)}; {mend(student, teacher, projection)}"
        )


def mend(student: Tensor, teacher: Tensor, projection: str) -> str:
    if sorted(sizes(student)) == sorted(sizes(teacher)):
        return "use the same order of axes for both, and give the axis of the channels as `channel_axis`"
    return projection


def by_channels(x: Tensor, channel_axis: int) -> Tensor:
    """A map as `[batch, channels, positions]`."""
    return x.movedim(channel_axis, 1).flatten(2)


def at_least_one(name: str, value: float) -> float:
    """A power, which determines how a loss is computed and must not be an array."""
    if not 1 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and at least 1, got {value}")
    return float(value)


def ordered(channel_axis: int, *maps: Tensor) -> tuple[Tensor, ...]:
    """Maps as `[batch, channels, height, width]`."""
    return tuple(x.movedim(channel_axis, 1) for x in maps)


def smaller(x: Tensor, y: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps `[batch, channels, height, width]`."""
    return min(x.shape[2], y.shape[2]), min(x.shape[3], y.shape[3])


def pooled_alike(student_map: Tensor, teacher_map: Tensor, channel_axis: int = 1) -> tuple[Tensor, Tensor]:
    """Both as `[batch, channels, height, width]`, averaged to the smaller height and to the smaller width."""
    student, teacher = ordered(channel_axis, student_map, teacher_map)
    size = smaller(student, teacher)
    return pooled(student, *size), pooled(teacher, *size)


def pooled(x: Tensor, height: int, width: int) -> Tensor:
    """A map `[batch, channels, height, width]` averaged to a height and a width."""
    if x.shape[2] != height:
        x = (x.mT @ pooling(height, x.shape[2], x).T).mT
    if x.shape[3] != width:
        x = x @ pooling(width, x.shape[3], x).T
    return x


def spread(gradient: Tensor, height: int, width: int) -> Tensor:
    """The gradient with respect to a map of this height and width, given the gradient with respect to the pooled map."""
    if gradient.shape[2] != height:
        gradient = (gradient.mT @ pooling(gradient.shape[2], height, gradient)).mT
    if gradient.shape[3] != width:
        gradient = gradient @ pooling(gradient.shape[3], width, gradient)
    return gradient


def pooling(bins: int, length: int, like: Tensor) -> Tensor:
    """The matrix that averages `length` positions into `bins`, which overlap if the length is not a multiple."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)
    return functional.adaptive_avg_pool1d(eye, bins).T


def largest_entry(x: Tensor) -> Tensor:
    """The largest entry of each example, a constant divisor; infinite for a map of zeros (or subnormals)."""
    flat = x.detach().flatten(1)  # two passes are faster than `abs`
    largest = torch.maximum(flat.amax(1), -flat.amin(1)).reshape(-1, 1, 1, 1)
    return torch.where(largest < torch.finfo(x.dtype).tiny, math.inf, largest)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is infinite."""
    return torch.where(scale.isinf(), 0, x / scale)


def are_moderate(*sums: Tensor) -> bool:
    """Whether sums of powers are so moderate that their terms need no scaling; True only in eager PyTorch on a CPU."""
    if not eager_on_cpu(*sums) or not all(x.numel() for x in sums):
        return False
    ends = [x.aminmax() for x in sums]
    return all(float(least) > 1e-24 and float(largest) < 1e24 for least, largest in ends)


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most each of these positive numbers; dividing by it causes no rounding."""
    return torch.where(x.isinf(), x, x / (2 * torch.frexp(x).mantissa))


def unit_and_length(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| over the last axis and |x|, for any finite x; for zeros (or subnormals) 0 and infinity.

    `unit` divides by the largest entry first, which rounds. This function does not, so rows of equal length keep the
    digits that they share.
    """
    square = (x * x).sum(-1, keepdim=True)
    if are_moderate(square):
        length = square.sqrt()
        return x / length, length
    largest = x.detach().abs().amax(-1, keepdim=True)
    scale = power_of_two(torch.where(largest < torch.finfo(x.dtype).tiny, math.inf, largest))
    x = scaled(x, scale)
    square = (x * x).sum(-1, keepdim=True)
    length = torch.where(square == 0, 1, square).sqrt()
    return x / length, length * scale


def across(direction: Tensor, length: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to x, given its direction and length, and the gradient for the direction."""
    return (gradient - (gradient * direction).sum(-1, keepdim=True) * direction) / length


def signed_power(x: Tensor, p: float) -> Tensor:
    """|x|^(p - 1) sign(x), and 0 at 0: times x it is |x|^p, and times p the derivative of that."""
    if p == int(p):
        power = x ** (int(p) - 1) if p > 2 else x if p == 2 else torch.ones_like(x)
        return power * x.sign() if p % 2 else power
    zero = x == 0
    return torch.where(zero, 1, x).abs() ** (p - 1) * x.sign()


def are_equal(x: Tensor, y: Tensor) -> Tensor | None:
    """`[batch]`: whether the maps of an example are equal; None if they cannot be."""
    if x.shape != y.shape or (eager_on_cpu(x, y) and not bool((x[:, 0, 0, 0] == y[:, 0, 0, 0]).any())):
        return None
    return (x == y).flatten(1).all(1)


def unless(equal: Tensor | None, difference: Tensor) -> Tensor:
    """The difference of the results of two maps; exactly 0 for equal maps, which a compiler may round differently."""
    if equal is None:
        return difference
    equal = equal.reshape(-1, *(1,) * (difference.ndim - 1))
    return difference - torch.where(equal, difference, 0).detach()
