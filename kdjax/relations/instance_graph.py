"""The edges of the graph between samples, the student's against the teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather_constant, rank
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked
from kdjax.relations._pairs import Pairs, Squares, over_pairs, squares


@checked
def instance_graph_loss(
    student: Float[Array, "batch student_dim"],
    teacher: Float[Array, "batch teacher_dim"],
    *,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Edges of the instance relationship graph: mean squared error between squared distances over their largest.

    $$\frac1B\sum_j\left(\frac{d_{ij}(s)^2}{\max_{kl}d_{kl}(s)^2}-\frac{d_{ij}(t)^2}{\max_{kl}d_{kl}(t)^2}\right)^2,\qquad d_{ij}(x)=\|x_i-x_j\|$$

    for example i, over every example j of the batch, i included (at distance 0).

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. The gradient flows through the largest distance too, which is that
        of the first of the pairs, in row order, that are farthest apart. Where all rows are equal, all edges are 0, with
        gradient 0.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The edge term of Liu et al., *Knowledge Distillation via Instance Relationship Graph*, CVPR 2019; the vertices and the
    transformations between layers are not here. The authors' Caffe layer holds the largest distance constant. The
    distances are computed by one matrix product. If some pair is so close that this would lose precision, they are
    computed from the differences, a row at a time. Under `vmap` both ways are computed.

    >>> import jax.numpy as jnp
    >>> from kdjax import instance_graph_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> t = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> print(f"{instance_graph_loss(s, t):.4f}")
    0.2178
    """

    def values(pairs: Pairs) -> jax.Array:
        gap = _edges(pairs.student, pairs, axis_name) - _edges(pairs.teacher, pairs, axis_name)
        return pairs.mean(jnp.square(gap))

    return over_pairs("instance_graph_loss", values, student, teacher, where, reduction, axis_name)


def _edges(x: jax.Array, pairs: Pairs, axis_name: AxisName | None) -> jax.Array:
    """Squared distances from this device's rows over the largest of all; 0 where that is 0."""
    found = squares(x, pairs.kept, pairs.local)
    largest = _largest(found, axis_name)
    return found.square / jnp.where(largest == 0, jnp.inf, largest)


def _largest(found: Squares, axis_name: AxisName | None) -> jax.Array:
    """The squared distance of the first pair that is farthest apart, of all devices, from its two rows."""
    square = jax.lax.stop_gradient(found.square)
    i, j = jnp.divmod(square.argmax(), square.shape[1])
    if axis_name is not None:
        i = i + jnp.asarray(rank(axis_name) * len(square), i.dtype)
        first = all_gather_constant(square.max()[None], axis_name).argmax()
        i, j = (all_gather_constant(place[None], axis_name)[first] for place in (i, j))
    return jnp.square(found.differences(found.rows[i])[j]).sum()
