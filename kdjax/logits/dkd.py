"""Decoupled knowledge distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import (
    check_classes,
    is_class,
    kl_and_gradient,
    kl_of_softmaxes,
    log_ratio,
    non_negative,
    positive,
    take_class,
    valid_index,
    weigh,
    without_class,
)
from kdjax._reduce import reduce, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Integer, Reduction, Scalar, checked


@checked
def dkd_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Decoupled knowledge distillation: the label against all other classes, and the other classes among themselves.

    $$T^2\left[\alpha\,\mathrm{KL}\big((q_y,1-q_y)\,\|\,(p_y,1-p_y)\big)+\beta\,\mathrm{KL}(\hat q\,\|\,\hat p)\right]$$

    with p = softmax(s/T), q = softmax(t/T); hats are softmaxes over the classes other than the label y.

    Args:
        student_logits: `[*batch, classes]`.
        teacher_logits: the same shape; constant.
        labels: `[*batch]`, the class of each example; one outside `0 .. classes - 1` gives NaN for that example.
        alpha: weight of the target part (TCKD), ≥ 0; a constant.
        beta: weight of the non-target part (NCKD), ≥ 0; a constant. With α = 1, and β = 1 − q_y for each example, the
            loss is KL.
        temperature: T > 0; an array has a gradient.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree and never negative.

    Raises:
        ValueError: a temperature that is not positive, a negative weight, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022, https://arxiv.org/abs/2203.08679. The released code
    hides the label by subtracting 1000 and takes the logarithm of a sum of probabilities, which is NaN once logits
    are about 100·T apart in float32; the mathematics is the same.

    >>> import jax.numpy as jnp
    >>> from kdjax import dkd_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{dkd_loss(s, t, jnp.array([0])):.4f}")
    1.2644
    """
    check_classes(student_logits)
    logits = student_logits, teacher_logits
    alpha, beta = non_negative("alpha", alpha, *logits), non_negative("beta", beta, *logits)
    temperature = positive("temperature", temperature, *logits)
    (labels,) = zero_masked(where, labels)
    labels, factor = valid_index(labels, student_logits.shape[-1])
    value = _decoupled(*logits, labels, alpha, beta, temperature, where=where)
    return reduce(factor.astype(value.dtype) * value, where, reduction, axis_name)


def decoupled_and_gradient(
    x: jax.Array, y: jax.Array, labels: jax.Array, alpha: Scalar, beta: Scalar, temperature: Scalar
) -> tuple[jax.Array, jax.Array]:
    """The loss, and its gradient: a T (p_y - q_y) at the label, b T (^p - ^q) - a T (p_y - q_y) ^p at the others."""
    hat_p, totals, others, difference = _others(x, y, labels, temperature)
    x_binary = _binary(take_class(x, labels)[..., None], *totals[0], temperature)
    y_binary = _binary(take_class(y, labels)[..., None], *totals[1], temperature)
    target, target_gradient = kl_and_gradient(x_binary, y_binary, 1.0)
    at_label = alpha * temperature * target_gradient[..., :1]
    gradient = beta * temperature * difference - at_label * hat_p
    square = temperature**2  # multiplied before the sum, because the sum might overflow
    value = weigh(square * alpha, target) + weigh(square * beta, others)
    return value, jnp.where(is_class(x, labels), at_label, gradient)


_decoupled = rowwise(decoupled_and_gradient)

Total = tuple[jax.Array, jax.Array]  # the largest logit, and log sum exp((x - largest) / T)


def _others(
    x: jax.Array, y: jax.Array, labels: jax.Array, temperature: Scalar
) -> tuple[jax.Array, tuple[Total, Total], jax.Array, jax.Array]:
    """^p, the totals of x and y, KL(^q || ^p) and ^p - ^q over the classes other than the label, if there are any."""
    p, q, ratio = log_ratio(without_class(x, labels), without_class(y, labels), temperature, may_be_empty=True)
    return p.p, (p[1:], q[1:]), *kl_of_softmaxes(p, q, ratio)


def _binary(at_label: jax.Array, peak: jax.Array, log_total: jax.Array, temperature: Scalar) -> jax.Array:
    """Logits, at temperature 1, of (the label, any other class), minus the largest, which would only cost digits."""
    empty = peak == jnp.finfo(peak.dtype).min
    largest = jax.lax.stop_gradient(jnp.maximum(at_label, jnp.where(empty, -jnp.inf, peak)))
    rest = jnp.where(empty, -jnp.inf, (peak - largest) / temperature + log_total)
    return jnp.concatenate([(at_label - largest) / temperature, rest], -1)
