"""Cosine distance: the student's feature in the direction of the teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.features._maps import unit_and_length


@checked
def cosine_loss(
    student: Float[Array, "*batch features"],
    teacher: Float[Array, "*batch features"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Cosine distance between features: only their direction matters, not their length.

    $$1-\hat s\cdot\hat t,\qquad\hat s=s/\|s\|,\quad\hat t=t/\|t\|$$

    Args:
        student: `[*batch, features]`.
        teacher: the same shape; constant.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`: 0 for the same direction, 1 for a right angle, 2 for opposite
        directions. Where the student or the teacher is zero it is 1, with gradient 0.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Sanh et al., *DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter*, 2019,
    https://arxiv.org/abs/1910.01108, for hidden states. Liger's gradient at a zero feature is 10²⁰. The released codes
    subtract the cosine from 1, which loses the digits of a small distance.

    >>> import jax.numpy as jnp
    >>> from kdjax import cosine_loss
    >>> s, t = jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0]])
    >>> print(f"{cosine_loss(s, t):.4f}")
    0.4000
    """
    return reduce(_cosine(student, teacher, where=where), where, reduction, axis_name)


def cosine_and_gradient(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 - u.v = |u - v|^2 / 2 for the unit rows u and v of x and y, and its gradient [(u - v) - (1 - u.v) u] / |x|."""
    (u, length), (v, other) = unit_and_length(x), unit_and_length(y)
    zero = ((u == 0).all(-1, keepdims=True).astype(u.dtype) + (v == 0).all(-1, keepdims=True).astype(u.dtype)) / 2
    difference = _difference(x, y, u, v, length, other)
    value = jnp.square(difference).sum(-1) / 2 + zero.squeeze(-1)
    return value, (difference - value[..., None] * u) / jnp.where(zero > 0, jnp.inf, length)


def _difference(
    x: jax.Array, y: jax.Array, u: jax.Array, v: jax.Array, length: jax.Array, other: jax.Array
) -> jax.Array:
    """u - v, computed from x - y if x and y have similar lengths, so that close rows keep their digits."""
    near = (other > length / 2) & (other < 2 * length)
    ratio = jnp.where(near, other, 1) / jnp.where(near, length, 1)
    step = jnp.where(near, x - y, 0) / length
    longer = (step * (u + ratio * v)).sum(-1, keepdims=True) / (1 + ratio)  # 1 - ratio
    return jnp.where(near, step - longer * v, u - v)


_cosine = rowwise(cosine_and_gradient)
