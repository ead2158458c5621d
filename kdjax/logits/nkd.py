"""Normalised knowledge distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import (
    check_classes,
    cross_entropy_of_softmax,
    is_class,
    non_negative,
    positive,
    softmax,
    take_class,
    valid_index,
    weigh,
    without_class,
)
from kdjax._reduce import reduce, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Integer, Reduction, Scalar, checked


@checked
def nkd_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    gamma: Scalar = 1.5,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Normalised knowledge distillation: cross-entropies on the label and on the normalised other classes.

    $$-q_y\log p_y-\gamma\,T^2\sum_{k\ne y}\hat q_k\log\hat p_k$$

    p and q are the softmaxes of student and teacher at temperature 1; hats are softmaxes over the classes other than
    the label y at temperature T. These are cross-entropies, so the loss is not 0 if student and teacher are equal.

    Args:
        student_logits: `[*batch, classes]`.
        teacher_logits: the same shape; constant.
        labels: `[*batch]`, the class of each example (one outside `0 .. classes - 1` gives NaN for that example), or a
            distribution `[*batch, classes]`, of which the most probable class is used, the first of equally probable
            ones.
        gamma: weight of the non-target part, ≥ 0; a constant.
        temperature: T > 0, of the non-target part alone; an array has a gradient.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a temperature that is not positive, a negative weight, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023,
    https://arxiv.org/abs/2303.13005. Revisions of the released code hide the label by subtracting 1000, remove it, or
    leave it in by mistake; this function masks it.

    >>> import jax.numpy as jnp
    >>> from kdjax import nkd_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{nkd_loss(s, t, jnp.array([0])):.4f}")
    0.7282
    """
    check_classes(student_logits)
    logits = student_logits, teacher_logits
    gamma, temperature = non_negative("gamma", gamma, *logits), positive("temperature", temperature, *logits)
    (labels,) = zero_masked(where, labels if labels.ndim < student_logits.ndim else jnp.argmax(labels, -1))
    labels, factor = valid_index(labels, student_logits.shape[-1])
    value = _normalized(*logits, labels, gamma, temperature, where=where)
    return reduce(factor.astype(value.dtype) * value, where, reduction, axis_name)


def normalized_and_gradient(
    x: jax.Array, y: jax.Array, labels: jax.Array, gamma: Scalar, temperature: Scalar
) -> tuple[jax.Array, jax.Array]:
    """The loss, and its gradient q_y (p - 1 at the label) + gamma T (^p - ^q)."""
    p, q_y = softmax(x), take_class(softmax(y).p, labels)[..., None]
    log_p_y = take_class(x, labels)[..., None] - p.peak - p.log_total
    target = -jnp.where(q_y == 0, 0 * p.log_total, q_y * jnp.where(q_y == 0, 0, log_p_y)).squeeze(-1)
    hat_p, hat_q = (softmax(without_class(a, labels), temperature, may_be_empty=True) for a in (x, y))
    others, gradient = cross_entropy_of_softmax(hat_p, x, hat_q.p, temperature)
    weight = gamma * temperature**2
    return target + weigh(weight, others), q_y * (p.p - is_class(x, labels).astype(x.dtype)) + weight * gradient


_normalized = rowwise(normalized_and_gradient)
