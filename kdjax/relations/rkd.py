"""Distances and angles between samples, the student's against the teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import non_negative, unit
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
        A scalar, or `[batch]` with `reduction="none"`. Two equal rows have distance 0 and a cosine of 0 to every other
        side, with gradient 0, and count in the mean distance, through which the gradient flows too. A single example, and
        a batch of equal rows, has distances and cosines 0.

    Raises:
        ValueError: a negative weight, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Park et al., *Relational Knowledge Distillation*, CVPR 2019, [arXiv:1904.05068](https://arxiv.org/abs/1904.05068). The
    authors' code keeps distances above 1e-6, so that two equal rows have a gradient of 1e11. The angles are computed one
    vertex i at a time, and again in the backward pass, from the distances of all pairs. If some pair is so close that this
    would lose precision, distances and angles are computed from the differences. Under `vmap` both ways are computed.

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
        (d, below), (e, below_teacher) = _root(s.square), _root(t.square)
        gap = pairs.local(_over_mean(d, pairs.kept)) - pairs.local(_over_mean(e, pairs.kept))
        angles = jax.lax.cond(
            s.clear & t.clear,
            lambda: _by_distances((s.square, below, t.square, below_teacher), pairs),
            lambda: _by_differences(s, t, pairs),
        )
        number = count(pairs.kept, gap.dtype)
        return distance_weight * pairs.mean(_huber(gap)) + angle_weight * angles / jnp.square(number)

    return over_pairs("rkd_loss", values, student, teacher, where, reduction, axis_name)


def _root(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The distances, and one over them, or 0 where they are 0."""
    apart = square > 0
    root = jnp.sqrt(jnp.where(apart, square, 1))
    return jnp.where(apart, root, 0), jnp.where(apart, 1 / root, 0)


def _over_mean(distance: jax.Array, kept: jax.Array) -> jax.Array:
    """Distances over their mean, of different examples; 0 where that is 0."""
    number = count(kept, distance.dtype)
    mean = distance.sum() / (number * jnp.maximum(number - 1, 1))
    return distance / jnp.where(mean == 0, 1, mean)


def _huber(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < 1, jnp.square(x) / 2, jnp.abs(x) - 1 / 2)


def _by_distances(sides: tuple[jax.Array, ...], pairs: Pairs) -> jax.Array:
    """The sum over the angles at each of this device's rows, one row at a time, by the law of cosines."""

    def cosines(square: jax.Array, of_row: jax.Array, below: jax.Array) -> jax.Array:
        return (of_row[:, None] + of_row[None] - square) * (below[:, None] * below[None]) / 2

    def vertex(row: tuple[jax.Array, ...]) -> jax.Array:
        return _huber(cosines(sides[0], *row[:2]) - cosines(sides[2], *row[2:])).sum()

    return jax.lax.map(jax.checkpoint(vertex), tuple(map(pairs.local, sides)))


def _by_differences(s: Squares, t: Squares, pairs: Pairs) -> jax.Array:
    """The same from the differences of the rows."""

    def sides(found: Squares, row: jax.Array) -> jax.Array:
        return unit(jnp.where(pairs.kept[:, None], found.differences(row), 0))

    def vertex(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _huber(gram(sides(s, row[0])) - gram(sides(t, row[1]))).sum()

    return jax.lax.map(jax.checkpoint(vertex), (pairs.local(s.rows), pairs.local(t.rows)))
