"""Attention transfer: where in a map the activations are large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.features._maps import (
    across,
    are_equal,
    are_moderate,
    at_least_one,
    check_maps,
    largest_entry,
    ordered,
    pooled,
    scaled,
    signed_power,
    smaller,
    spread,
    unit_and_length,
    unless,
)


@checked
def attention_transfer_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    *,
    p: float = 2,
    channel_axis: int = 1,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Attention transfer: where the student's activations are large, compared with where the teacher's are.

    $$\sum_{\text{maps}}\frac1{HW}\sum_x\big(\hat a_x-\hat b_x\big)^2,\qquad
    a_x=\frac1C\sum_c|f_{cx}|^p,\quad\hat a=\frac a{\lVert a\rVert}$$

    f is a map of the student, and b is computed from the teacher's map in the same way. For a map of zeros â is 0.

    Args:
        student_maps: maps `[batch, channels, height, width]`, any number of them, of any sizes.
        teacher_maps: as many, of any sizes and numbers of channels; constant. Two maps of different sizes are averaged
            first, to the smaller height and to the smaller width.
        p: p ≥ 1, the power: the larger it is, the more the largest activations count. It determines how the loss is
            computed, so it must be a number and not an array.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers of maps that differ, p below 1 or not finite, a channel axis other than 1, 2, 3 or
            its negative, an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point tensors.

    Zagoruyko and Komodakis, *Paying More Attention to Attention*, ICLR 2017, https://arxiv.org/abs/1612.03928. The
    paper uses the norm of the difference; the authors' code uses the mean of squares, as this function does.

    >>> import torch
    >>> from kdtorch import attention_transfer_loss
    >>> s, t = torch.ones((1, 3, 1, 2)), torch.tensor([[[[1.0, 0.0]]]])
    >>> print(f"{attention_transfer_loss([s], [t]):.4f}")
    0.2929
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    p = at_least_one("p", p)
    maps = [
        _attention_transfer(*ordered(channel_axis, *both), p, where=where)
        for both in zip(student_maps, teacher_maps, strict=True)
    ]
    return reduce(torch.stack(maps).sum(0), where, reduction, group)


def attention_transfer_and_gradient(x: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The mean of (a/|a| - b/|b|)^2 over positions, with a, b the channel means of |x|^p, |y|^p, and its gradient."""
    height, width = smaller(x, y)
    f, g = pooled(x, height, width), pooled(y, height, width)
    a, b, scale = _attention(f, p), _attention(g, p), f.new_ones(())
    if not are_moderate(a.amax(-1), b.amax(-1)):
        scale = largest_entry(f)
        f = scaled(f, scale)
        a, b = _attention(f, p), _attention(scaled(g, largest_entry(g)), p)
    (direction, length), (other, _) = unit_and_length(a), unit_and_length(b)
    difference = unless(are_equal(x, y), direction - other)
    pull = across(direction, length, difference * (2 * p / f.shape[1] / a.shape[-1])).reshape(len(f), 1, height, width)
    return difference.square().mean(-1), spread(pull / scale * signed_power(f, p), *x.shape[2:])


def _attention(f: Tensor, p: float) -> Tensor:
    """The mean of |f|^p over channels, `[batch, positions]`."""
    return (f * signed_power(f, p)).mean(1).flatten(1)


_attention_transfer = rowwise(attention_transfer_and_gradient, axes=3)
