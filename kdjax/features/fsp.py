"""The flow of the solution procedure: how each map of a network leads to the next."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax._numerics import HIGHEST, promote
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.features._maps import check_maps, pooled_alike, spread


@checked
def fsp_loss(
    student_maps: Sequence[Float[Array, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Array, "batch _ _ _"]],
    *,
    channel_axis: int = -1,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Flow of the solution procedure: the products of the channels of neighbouring maps should match the teacher's.

    $$\sum_i\frac1{C_iC_{i+1}}\big\|G(s_i,s_{i+1})-G(t_i,t_{i+1})\big\|^2,\qquad
    G(f,g)_{cd}=\tfrac1{HW}\sum_xf_{cx}\,g_{dx}$$

    $f_{cx}$ is channel c of a map at position x, and i runs over the maps but the last. Of two neighbouring maps of one
    network both are first averaged to the smaller height and to the smaller width, each on its own, by adaptive average
    pooling.

    Args:
        student_maps: maps `[batch, height, width, channels]`, at least two, of any sizes, in the order of the layers.
        teacher_maps: as many, each with the channels of the student's map and any height and width; constant.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: fewer than two maps, numbers of maps that differ, channels that differ, a channel axis other than 1,
            2, 3 or its negative, an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point arrays.

    Yim et al., *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning*, CVPR
    2017, https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html. RepDistiller makes
    an array of all products at all positions before it averages them, and pools squares by their heights alone.
    torchdistill pools the larger map by its maximum.

    >>> import jax.numpy as jnp
    >>> from kdjax import fsp_loss
    >>> s, t = [jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2, 2, 3))], [jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 2, 2, 3))]
    >>> print(f"{fsp_loss(s, t):.4f}")
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
                f"{theirs}; `Projector` in `nn` brings a student's map to the teacher's channels"
            )
    (student, ours), (teacher, theirs) = (_joined(x, channel_axis) for x in (student_maps, teacher_maps))
    flow = rowwise(functools.partial(flow_and_gradient, ours=ours, theirs=theirs))
    return reduce(flow(student, teacher, where=where), where, reduction, axis_name)


Shapes = tuple[tuple[int, ...], ...]


def _joined(maps: Sequence[Array], channel_axis: int) -> tuple[jax.Array, Shapes]:
    """All maps of a network as one array `[batch, entries]`, and the shape of each."""
    maps = [jnp.moveaxis(x, channel_axis, -1) for x in (maps if len({x.dtype for x in maps}) == 1 else promote(*maps))]
    shapes = tuple(x.shape[1:] for x in maps)
    return jnp.concatenate([x.reshape(len(x), math.prod(x.shape[1:])) for x in maps], 1), shapes


def _split(x: jax.Array, shapes: Shapes) -> list[jax.Array]:
    maps, place = [], 0
    for a, b, c in shapes:
        maps.append(x[:, place : place + a * b * c].reshape(len(x), a, b, c))
        place += a * b * c
    return maps


def flow_and_gradient(x: jax.Array, y: jax.Array, ours: Shapes, theirs: Shapes) -> tuple[jax.Array, jax.Array]:
    """The sum of the mean squares of G(f, g) - G(h, k), f and g neighbouring maps in x, h and k in y, and its gradient.

    The maps are divided by their largest entries, by which the result is multiplied step by step, so that nothing on the
    way is beyond the largest number unless the result is.
    """
    student, teacher = _split(x, ours), _split(y, theirs)
    scales = [_largest(f, h) for f, h in zip(student, teacher, strict=True)]
    apart = [f - h for f, h in zip(student, teacher, strict=True)] if ours == theirs else []
    student, teacher, apart = (
        [f / size for f, size in zip(maps, scales, strict=False)] for maps in (student, teacher, apart)
    )
    value, gradients = jnp.zeros(len(x), x.dtype), [jnp.zeros_like(f) for f in student]
    for i in range(len(student) - 1):
        f, g = pooled_alike(student[i], student[i + 1])
        if apart:  # G(f, g) - G(h, k) = G(f - h, g) + G(h, g - k), so that close maps keep their digits
            difference = _products(apart[i], student[i + 1]) + _products(teacher[i], apart[i + 1])
        else:
            difference = _products(*student[i : i + 2]) - _products(*teacher[i : i + 2])
        one, other = scales[i], scales[i + 1]
        value = value + jnp.square(difference * one[..., 0] * other[..., 0]).mean((1, 2))
        weight = difference * (2 / (difference.shape[1] * difference.shape[2] * f.shape[1] * f.shape[2]))
        of_f = jnp.einsum("bcd,bhwd->bhwc", weight, g, precision=HIGHEST) * other * one * other
        of_g = jnp.einsum("bcd,bhwc->bhwd", weight, f, precision=HIGHEST) * one * other * one
        gradients[i] += spread(of_f, *student[i].shape[1:3])
        gradients[i + 1] += spread(of_g, *student[i + 1].shape[1:3])
    return value, jnp.concatenate([slope.reshape(len(x), math.prod(slope.shape[1:])) for slope in gradients], 1)


def _largest(f: jax.Array, h: jax.Array) -> jax.Array:
    """The largest entry of two maps of an example, as a constant; 1 where both are zero."""
    largest = jnp.maximum(*(jnp.abs(x).max((1, 2, 3), keepdims=True) for x in (f, h)))
    return jax.lax.stop_gradient(jnp.where(largest < jnp.finfo(f.dtype).tiny, 1, largest))


def _products(f: jax.Array, g: jax.Array) -> jax.Array:
    """G(f, g): the mean over positions of the products of all channels, `[batch, channels, channels]`."""
    f, g = pooled_alike(f, g)
    return jnp.einsum("bhwc,bhwd->bcd", f, g, precision=HIGHEST) / (f.shape[1] * f.shape[2])
