"""Compares the distances and angles between samples of student and teacher."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kdjax._numerics import HIGHEST, non_negative, unit
from kdjax._reduce import count
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked
from kdjax.relations._pairs import Pairs, Squares, gram, over_pairs, squares


@checked
def rkd_loss(
    student: Float[Array, "batch student_dim"],
    teacher: Float[Array, "batch teacher_dim"],
    *,
    distance_weight: Scalar = 25.0,
    angle_weight: Scalar = 50.0,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Relational knowledge distillation: the distances of pairs, and the angles of triples, should match the teacher's.

    $$\frac{w_d}B\sum_jH\left(\frac{d_{ij}(s)}{\mu(s)}-\frac{d_{ij}(t)}{\mu(t)}\right)
    +\frac{w_a}{B^2}\sum_{jk}H\big(\cos_{ijk}(s)-\cos_{ijk}(t)\big)$$

    $$d_{ij}(x)=\|x_i-x_j\|,\qquad \cos_{ijk}(x)=\frac{(x_j-x_i)\cdot(x_k-x_i)}{d_{ij}(x)\,d_{ik}(x)}$$

    for example i, over every j and k of the batch. μ is the mean distance of different examples, and H the Huber
    function, x²/2 up to 1 and |x| − ½ beyond.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        distance_weight: w_d ≥ 0, of the distances.
        angle_weight: w_a ≥ 0, of the angles.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. Two equal rows have distance 0, and a cosine of 0 with every
        other side, with gradient 0. They count in the mean distance, through which the gradient flows too. For a single
        example, or a batch of equal rows, all distances and cosines are 0.

    Raises:
        ValueError: a negative weight, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Park et al., *Relational Knowledge Distillation*, CVPR 2019, https://arxiv.org/abs/1904.05068. The authors' code
    clamps distances to at least 1e-6, so two equal rows have a gradient of 1e11. The angles are computed one vertex i
    at a time, and again in the backward pass, from the distances of all pairs. If some pair is so close that this would
    lose precision, distances and angles are computed from the differences. Under `vmap` both ways are computed.

    >>> import jax.numpy as jnp
    >>> from kdjax import rkd_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> t = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> print(f"{rkd_loss(s, t):.4f}")
    4.4266
    """
    distance_weight = non_negative("distance_weight", distance_weight, student, teacher)
    angle_weight = non_negative("angle_weight", angle_weight, student, teacher)

    def values(pairs: Pairs) -> jax.Array:
        s, t = (squares(x, pairs.kept, lambda x: x) for x in (pairs.student, pairs.teacher))
        d, e = (_over_mean(_root(x.square)[0], pairs.kept) for x in (s, t))
        gap = pairs.local(d) - pairs.local(e)
        value = distance_weight * pairs.mean(_huber(gap))
        if isinstance(angle_weight, float) and angle_weight == 0:
            return value
        ways = (functools.partial(way, s, t, pairs) for way in (_by_distances, _by_differences))
        angles = jax.lax.cond(s.clear & t.clear, *ways)
        number = count(pairs.kept, gap.dtype)
        return value + angle_weight * angles / jnp.square(number)

    return over_pairs("rkd_loss", values, student, teacher, where, reduction, axis_name)


def _root(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distances and their reciprocals, which are 0 where a distance is 0."""
    apart = square > 0
    root = jnp.sqrt(jnp.where(apart, square, 1))
    return jnp.where(apart, root, 0), jnp.where(apart, 1 / root, 0)


def _over_mean(distance: jax.Array, kept: jax.Array) -> jax.Array:
    """Distances divided by their mean over pairs of different examples; 0 if the mean is 0."""
    number = count(kept, distance.dtype)
    mean = distance.sum() / (number * jnp.maximum(number - 1, 1))
    return distance / jnp.where(mean == 0, 1, mean)


def _huber(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < 1, jnp.square(x) / 2, jnp.abs(x) - 1 / 2)


def _by_distances(s: Squares, t: Squares, pairs: Pairs) -> jax.Array:
    """The sum over the angles at each of this device's rows, one row at a time, by the law of cosines."""
    rows = (*map(pairs.local, _root(s.square)), *map(pairs.local, _root(t.square)))
    vertex = jax.checkpoint(lambda row: _angles(s.square, t.square, *row))
    return jax.lax.map(vertex, rows)


# The gradient is written by hand and uses that the angle between j and k equals that between k and j. All sums over one
# of the two are then matrix products, which takes half the time.
@jax.custom_jvp
def _angles(
    square: jax.Array, other: jax.Array, d: jax.Array, below: jax.Array, e: jax.Array, below_teacher: jax.Array
) -> jax.Array:
    """The sum over the angles at a row, from the squares of all pairs, its distances d and e, and their reciprocals."""
    return _huber(_cosines(square, d, below) - _cosines(other, e, below_teacher)).sum(0).sum()


@_angles.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    square, other, d, below, e, below_teacher = primals
    of_square, _, of_d, of_below, _, _ = tangents  # the teacher is constant
    slope = jnp.clip(_cosines(square, d, below) - _cosines(other, e, below_teacher), -1, 1)
    over, beyond = jnp.matmul(slope, jnp.stack([below, d], 1), precision=HIGHEST).T
    beyond = beyond - jnp.matmul(slope * square, below, precision=HIGHEST)
    weight = slope * (below[:, None] * below[None]) / 2
    return _angles(*primals), (over * of_d + beyond * of_below).sum() - (weight * of_square).sum()


def _cosines(square: jax.Array, d: jax.Array, below: jax.Array) -> jax.Array:
    """The cosines at a row between all pairs, from the squares of all pairs, its distances d, and their reciprocals."""
    return (d[:, None] * below[None] + below[:, None] * d[None] - square * below[:, None] * below[None]) / 2


def _by_differences(s: Squares, t: Squares, pairs: Pairs) -> jax.Array:
    """The same, computed from the differences of the rows."""

    def sides(found: Squares, row: jax.Array) -> jax.Array:
        return unit(jnp.where(pairs.kept[:, None], found.differences(row), 0))

    def vertex(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _huber(gram(sides(s, row[0])) - gram(sides(t, row[1]))).sum()

    return jax.lax.map(jax.checkpoint(vertex), (pairs.local(s.rows), pairs.local(t.rows)))
