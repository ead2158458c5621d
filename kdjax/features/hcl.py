"""Hierarchical context loss, the loss of ReviewKD."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax._numerics import HIGHEST, promote
from kdjax._reduce import reduce, zero_masked
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.features._maps import check_maps, check_shapes, pooling

_CONNECTORS = "ReviewKD's connectors map a student's maps to the teacher's shapes, with `out_channels` and `out_shapes`"


@checked
def hcl_loss(
    student_maps: Sequence[Float[Array, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Array, "batch _ _ _"]],
    *,
    channel_axis: int = -1,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Hierarchical context loss: compares feature maps at full size and pooled to 4×4, 2×2 and 1×1, summed over maps.

    $$\sum_{\text{maps}}\frac{\sum_l w_l\,\mathrm{MSE}\big(\mathrm{pool}_l(s),\mathrm{pool}_l(t)\big)}{\sum_l w_l},
    \qquad w=1,\tfrac12,\tfrac14,\tfrac18$$

    The full map has the weight 1. A pooled level that is not smaller than the map's height is dropped, and each of the
    remaining levels has half the weight of the one before. The MSE is over channels and positions.

    Args:
        student_maps: maps `[batch, height, width, channels]`, any number of them, of any sizes.
        teacher_maps: as many, of the same shapes; constant.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers or shapes of maps that differ, a channel axis other than 1, 2, 3 or its negative,
            an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point arrays.

    Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021, https://arxiv.org/abs/2104.09044. The
    released code stops at the shorter of two lists of maps; the value is the same.

    >>> import jax.numpy as jnp
    >>> from kdjax import hcl_loss
    >>> s, t = jnp.ones((2, 8, 8, 3)), jnp.zeros((2, 8, 8, 3))
    >>> print(f"{hcl_loss([s], [t]):.4f}")
    1.0000
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    check_shapes(student_maps, teacher_maps, _CONNECTORS)
    maps = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student, teacher = zero_masked(where, *promote(student, teacher))
        maps.append(_one_map(student, teacher, channel_axis))
    return reduce(jnp.stack(maps).sum(0), where, reduction, axis_name)


def _one_map(student: jax.Array, teacher: jax.Array, channel_axis: int) -> jax.Array:
    # pooling is linear, so the difference is pooled
    difference = jnp.moveaxis(student - jax.lax.stop_gradient(teacher), channel_axis, -1)
    weight, weights, source = 1.0, 1.0, difference
    total = jnp.square(difference).mean((1, 2, 3))
    for size in (4, 2, 1):
        if size < difference.shape[1]:
            weight /= 2
            weights += weight
            pooled = _pool(source, size)
            source = pooled if _fits(source, size) else source
            total += weight * jnp.square(pooled).mean((1, 2, 3))
    return total / weights


def _fits(x: jax.Array, size: int) -> bool:
    """Whether the bins are equal and do not overlap, so averages can be computed from averages."""
    return x.shape[1] % size == 0 and x.shape[2] % size == 0


def _pool(x: jax.Array, size: int) -> jax.Array:
    batch, height, width, channels = x.shape
    if _fits(x, size):
        return x.reshape(batch, size, height // size, size, width // size, channels).mean((2, 4))
    rows, columns = pooling(size, height, x.dtype), pooling(size, width, x.dtype)
    return jnp.einsum("rh,bhwc,qw->brqc", rows, x, columns, precision=HIGHEST)
