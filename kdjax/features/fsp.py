"""The flow of the solution procedure: the products of the channels of neighbouring maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax._numerics import HIGHEST
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.features._maps import check_maps, ordered, pooled_alike, spread


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

    $$\sum_i\frac1{C_iC_{i+1}}\|G(s_i,s_{i+1})-G(t_i,t_{i+1})\|^2,\qquad
    G(f,g)_{cd}=\tfrac1{HW}\sum_xf_{cx}\,g_{dx}$$

    $f_{cx}$ is channel c of a map at position x, and i runs over all maps except the last. Two neighbouring maps of a
    network are first averaged to the smaller height and to the smaller width, separately, by adaptive average pooling.

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

    Yim et al., *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning*,
    CVPR 2017, https://doi.org/10.1109/CVPR.2017.754. RepDistiller makes an array of all products at all positions
    before it averages them, and pools to squares, comparing heights only. torchdistill pools the larger map by its
    maximum.

    >>> import jax.numpy as jnp
    >>> from kdjax import fsp_loss
    >>> s = [jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2, 2, 3))]
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
    pairs = [_flow(s[i], s[i + 1], t[i], t[i + 1], where=where) for i in range(len(s) - 1)]
    return reduce(jnp.stack(pairs).sum(0), where, reduction, axis_name)


def flow_and_gradients(
    f: jax.Array, g: jax.Array, h: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean square of G(f, g) - G(h, k), and its gradients with respect to f and g.

    The maps are divided by their largest entries, and the results are multiplied by these entries one after another, so
    that no intermediate result overflows unless the final one does.
    """
    one, other = _scale(f, h), _scale(g, k)
    first, second = f, -k
    if (f.shape, g.shape) == (h.shape, k.shape):
        # for close maps G(f, g) - G(h, k) is computed as G(f - h, g) + G(h, g - k), which keeps their digits
        near = (_largest(f - h) < one / 2) & (_largest(g - k) < other / 2)
        first, second = jnp.where(near, f - h, f), jnp.where(near, g - k, -k)
    f, g, h = f / one, g / other, h / one
    difference = _products(first / one, g) + _products(h, second / other)
    small, narrow = pooled_alike(f, g)
    weight = difference * (2 / math.prod((*difference.shape[1:], *small.shape[1:3])))
    of_f = spread(jnp.einsum("bcd,bhwd->bhwc", weight, narrow, precision=HIGHEST), *f.shape[1:3])
    of_g = spread(jnp.einsum("bcd,bhwc->bhwd", weight, small, precision=HIGHEST), *g.shape[1:3])
    value = jnp.square(difference).mean((1, 2))
    for size in (one, other, one, other):
        value = value * size[:, 0, 0, 0]
    return value, of_f * other * one * other, of_g * one * other * one


def _scale(f: jax.Array, h: jax.Array) -> jax.Array:
    """The largest entry of two maps of an example, as a constant; 1 where both are zero."""
    largest = jnp.maximum(_largest(f), _largest(h))
    return jnp.where(largest < jnp.finfo(largest.dtype).tiny, 1, largest)


def _largest(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.abs(x).max((1, 2, 3), keepdims=True))


def _products(f: jax.Array, g: jax.Array) -> jax.Array:
    """G(f, g): the mean over positions of the products of all channels, `[batch, channels, channels]`."""
    f, g = pooled_alike(f, g)
    return jnp.einsum("bhwc,bhwd->bcd", f, g, precision=HIGHEST) / (f.shape[1] * f.shape[2])


_flow = rowwise(flow_and_gradients, learns=2)
