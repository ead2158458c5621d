"""The flow of the solution procedure: the products of the channels of neighbouring maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._numerics import own, promote, with_gradients
from kdtorch._reduce import reduce, zeroed
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked
from kdtorch.features._maps import check_maps, ordered, smaller, spread


@checked
def fsp_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    *,
    channel_axis: int = 1,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Flow of the solution procedure: the products of the channels of neighbouring maps should match the teacher's.

    $$\sum_i\frac1{C_iC_{i+1}}\|G(s_i,s_{i+1})-G(t_i,t_{i+1})\|^2,\qquad
    G(f,g)_{cd}=\tfrac1{HW}\sum_xf_{cx}\,g_{dx}$$

    $f_{cx}$ is channel c of a map at position x, and i runs over all maps except the last. Two neighbouring maps of a
    network are first averaged to the smaller height and to the smaller width, separately, by adaptive average pooling.

    Args:
        student_maps: maps `[batch, channels, height, width]`, at least two, of any sizes, in the order of the layers.
        teacher_maps: as many, each with the channels of the student's map and any height and width; constant.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: fewer than two maps, numbers of maps that differ, channels that differ, a channel axis other than 1,
            2, 3 or its negative, an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point tensors.

    Yim et al., *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning*,
    CVPR 2017, https://doi.org/10.1109/CVPR.2017.754. RepDistiller makes an array of all products at all positions
    before it averages them, and pools to squares, comparing heights only. torchdistill pools the larger map by its
    maximum.

    >>> import torch
    >>> from kdtorch import fsp_loss
    >>> s = [torch.ones((1, 2, 4, 4)), torch.ones((1, 3, 2, 2))]
    >>> print(f"{fsp_loss(s, [0 * x for x in s]):.4f}")
    1.0000
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    if len(student_maps) < 2:
        raise ValueError(
            "`student_maps` and `teacher_maps` must hold at least 2 maps, because each is multiplied by the next, got 1; "
            "add a map of another layer of each network"
        )
    for i, (student, teacher) in enumerate(zip(student_maps, teacher_maps, strict=True)):
        ours, theirs = (x.shape[channel_axis] for x in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"`student_maps[{i}]` and `teacher_maps[{i}]` must have the same number of channels, got {ours} and "
                f"{theirs}; `Projector` in `nn` maps a student's channels to the teacher's"
            )
    s, t = (ordered(channel_axis, *maps) for maps in (student_maps, teacher_maps))
    pairs = [_flow(s[i], s[i + 1], t[i], t[i + 1], where) for i in range(len(s) - 1)]
    return reduce(torch.stack(pairs).sum(0), where, reduction, group)


def flow_and_gradients(f: Tensor, g: Tensor, h: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean square of G(f, g) - G(h, k), and its gradients with respect to f and g.

    The maps are divided by their largest entries, and the results are multiplied by these entries one after another, so
    that no intermediate result overflows unless the final one does.
    """
    one, other = _scale(f, h), _scale(g, k)
    first, second = f, -k
    if (f.shape, g.shape) == (h.shape, k.shape):
        # for close maps G(f, g) - G(h, k) is computed as G(f - h, g) + G(h, g - k), which keeps their digits
        near = (_largest(f - h) < one / 2) & (_largest(g - k) < other / 2)
        first, second = torch.where(near, f - h, f), torch.where(near, g - k, -k)
    f, g, h = f / one, g / other, h / one
    difference = _products(first / one, g) + _products(h, second / other)
    small, narrow = _pooled_alike(f, g)
    weight = difference * (2 / math.prod((*difference.shape[1:], *small.shape[2:])))
    of_f = spread((weight @ narrow.flatten(2)).view(small.shape), *f.shape[2:])
    of_g = spread((weight.mT @ small.flatten(2)).view(narrow.shape), *g.shape[2:])
    value = difference.square().mean((1, 2))
    for size in (one, other, one, other):
        value = value * size[:, 0, 0, 0]
    return value, of_f * other * one * other, of_g * one * other * one


def _scale(f: Tensor, h: Tensor) -> Tensor:
    """The largest entry of two maps of an example, as a constant; 1 where both are zero."""
    largest = torch.maximum(_largest(f), _largest(h))
    return torch.where(largest < torch.finfo(largest.dtype).tiny, 1, largest)


def _largest(x: Tensor) -> Tensor:
    return x.detach().abs().amax((1, 2, 3), keepdim=True)


def _products(f: Tensor, g: Tensor) -> Tensor:
    """G(f, g): the mean over positions of the products of all channels, `[batch, channels, channels]`."""
    f, g = _pooled_alike(f, g)
    return f.flatten(2) @ g.flatten(2).mT / (f.shape[2] * f.shape[3])


def _pooled_alike(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Like `pooled_alike`, but sums are divided only once, so large entries of opposite signs cancel exactly."""
    size = smaller(f, g)
    f, g = (x if x.shape[2:] == size else functional.adaptive_avg_pool2d(x, size) for x in (f, g))
    return f, g


def _flow(f: Tensor, g: Tensor, h: Tensor, k: Tensor, where: Tensor | None) -> Tensor:
    return _with_gradients(f, g, h, k, where)[0]


def _of_kept(
    f: Tensor, g: Tensor, h: Tensor, k: Tensor, where: Tensor | None, *asked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    f, g, h, k = promote(f, g, h, k)
    if where is None:
        return flow_and_gradients(f, g, h, k)
    where = own(where)
    value, of_f, of_g = zeroed(where, *flow_and_gradients(*zeroed(where, f, g, h, k)))
    return value, of_f, of_g


# Written by hand, so that only the gradients are stored until the backward pass; autograd would store maps and
# products.
_with_gradients = with_gradients(_of_kept, learns=2)
