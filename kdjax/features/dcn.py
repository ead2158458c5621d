"""Dynamic centre norm: the student's feature along its class's centre."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import promote, unit, valid_index
from kdjax._reduce import reduce, zero_masked
from kdjax._typing import Array, AxisName, Bool, Float, Integer, Reduction, checked


@checked
def dcn_loss(
    student: Float[Array, "*batch dim"],
    teacher: Float[Array, "*batch dim"],
    labels: Integer[Array, "*batch"],
    centers: Float[Array, "classes dim"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Dynamic centre norm: the student's feature should lie along its class's learned centre, no shorter than the teacher's.

    $$1-\frac{s\cdot\hat c_y}{\max(\|s\|,\|t\|)},\qquad\hat c_y=c_y/\|c_y\|$$

    Args:
        student: `[*batch, dim]`.
        teacher: the same shape; constant. Only its norm is used.
        labels: `[*batch]`, the class of each example; one outside `0 .. classes - 1` gives NaN for that example.
        centers: `[classes, dim]`, learned with the student (`kdjax.nn.DynamicCenterNormLoss` holds them).
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. Where the two norms are equal, the gradient is that of the
        student's norm. Two zero features give 1 with gradient 0, and so does a zero centre.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's DynamicCenterNormLoss, after Wang et al., *Improving Knowledge Distillation via
    Regularizing Feature Norm and Direction*, 2023, https://arxiv.org/abs/2305.17007, where the centres are the
    teacher's class means. The released code loops over the batch and is NaN at a zero feature or centre.

    >>> import jax.numpy as jnp
    >>> from kdjax import dcn_loss
    >>> s, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]])
    >>> centers = jnp.array([[0.0, 1.0], [3.0, 0.0]])
    >>> print(f"{dcn_loss(s, t, jnp.array([1]), centers):.4f}")
    0.5000
    """
    student, teacher, centers = promote(student, teacher, centers)
    student, teacher, labels = zero_masked(where, student, teacher, labels)
    labels, factor = valid_index(labels, centers.shape[0])
    center = unit(jnp.take(centers, labels, axis=0))

    # the value depends only on s / scale and t / scale, whose squares neither overflow nor underflow
    scale = jax.lax.stop_gradient(jnp.maximum(jnp.abs(student), jnp.abs(teacher)).max(-1, keepdims=True))
    zero = scale < jnp.finfo(student.dtype).tiny
    student, teacher = (jnp.where(zero, 0, x / jnp.where(zero, 1, scale)) for x in (student, teacher))
    student_square, teacher_square = jnp.square(student).sum(-1), jnp.square(jax.lax.stop_gradient(teacher)).sum(-1)
    square = jnp.where(student_square < teacher_square, teacher_square, student_square)
    cosine = (student * center).sum(-1) / jnp.sqrt(jnp.where(square == 0, 1, square))
    return reduce(factor * (1 - cosine), where, reduction, axis_name)
