"""Compares the edges of the graph between samples of student and teacher."""

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
    r"""Edges of the instance relationship graph: mean squared error between squared distances divided by the largest.

    $$\frac1B\sum_j\left(\frac{d_{ij}(s)^2}{\max_{kl}d_{kl}(s)^2}-\frac{d_{ij}(t)^2}{\max_{kl}d_{kl}(t)^2}\right)^2,\qquad d_{ij}(x)=\|x_i-x_j\|$$

    for example i, over every example j of the batch, i included (at distance 0).

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. The gradient also flows through the largest distance. If several
        pairs are equally far apart, it is that of the first pair in row order. If all rows are equal, all edges are 0,
        with gradient 0.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Liu et al., *Knowledge Distillation via Instance Relationship Graph*, CVPR 2019,
    https://doi.org/10.1109/CVPR.2019.00726. This is the edge term; the terms for vertices and for transformations
    between layers are not included. In the authors' Caffe layer the largest distance is a constant. The distances are
    computed by one matrix product. If some pair is so close that this would lose precision, they are computed from the
    differences, a row at a time. Under `vmap` both ways are computed.

    >>> import jax.numpy as jnp
    >>> from kdjax import instance_graph_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> t = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> print(f"{instance_graph_loss(s, t):.4f}")
    0.2178
    """

    def values(pairs: Pairs) -> jax.Array:
        sides = tuple(squares(x, pairs.kept, pairs.local) for x in (pairs.student, pairs.teacher))
        edges, of_teacher = map(_edges, sides, _farthest(sides, axis_name))
        return pairs.mean(jnp.square(edges - of_teacher))

    return over_pairs("instance_graph_loss", values, student, teacher, where, reduction, axis_name)


def _edges(found: Squares, place: jax.Array) -> jax.Array:
    """This device's squared distances, divided by that of the pair at `place`, computed anew; 0 if that is 0."""
    i, j = jnp.divmod(place, found.square.shape[1])
    largest = jnp.square(found.differences(found.rows[i])[j]).sum()
    return found.square / jnp.where(largest == 0, jnp.inf, largest)


def _farthest(sides: tuple[Squares, ...], axis_name: AxisName | None) -> jax.Array:
    """For each side, the position of the first pair that is farthest apart, among the pairs of all devices in order."""
    local = [jax.lax.stop_gradient(x.square) for x in sides]
    places = jnp.stack([x.argmax() for x in local])
    if axis_name is None:
        return places
    places = places + jnp.asarray(rank(axis_name) * local[0].size, places.dtype)
    largest = all_gather_constant(jnp.stack([x.max() for x in local])[None], axis_name)
    return all_gather_constant(places[None], axis_name)[largest.argmax(0), jnp.arange(len(sides))]
