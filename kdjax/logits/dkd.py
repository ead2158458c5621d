"""Decoupled knowledge distillation."""

from __future__ import annotations

import jax

from kdjax._numerics import (
    binary_and_others,
    check_classes,
    is_class,
    kl_divergence,
    non_negative,
    positive,
    promote,
    valid_index,
    weigh,
)
from kdjax._reduce import reduce, zero_masked
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
    r"""Decoupled knowledge distillation: the label against the rest, and the rest among themselves.

    $$T^2\left[\alpha\,\mathrm{KL}\big((q_y,1-q_y)\,\|\,(p_y,1-p_y)\big)+\beta\,\mathrm{KL}(\hat q\,\|\,\hat p)\right]$$

    with p = softmax(s/T), q = softmax(t/T); hats are softmaxes over the classes other than the label y.

    Args:
        student_logits: `[*batch, classes]`.
        teacher_logits: the same shape; constant, its gradient is 0.
        labels: `[*batch]`, the class of each example; one outside `0 .. classes - 1` gives NaN for that example.
        alpha: weight of the target part (TCKD), ≥ 0.
        beta: weight of the non-target part (NCKD), ≥ 0. With α = 1 and β = 1 − q_y it is KL, example by example.
        temperature: T > 0.
        where: `[*batch]`, False for examples that count for nothing.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"`.
        axis_name: inside `shard_map`, the mesh axis that the batch is spread over; the mean over devices of what they
            return is then the loss of the whole batch.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. 0 where student and teacher agree, never below.

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
    student, teacher, labels = zero_masked(where, *promote(student_logits, teacher_logits), labels)
    check_classes(student)
    alpha, beta = non_negative("alpha", alpha, student), non_negative("beta", beta, student)
    temperature = positive("temperature", temperature, student)
    labels, factor = valid_index(labels, student.shape[-1])
    label = is_class(student, labels)
    student_binary, student_others = binary_and_others(student, label, temperature)
    teacher_binary, teacher_others = binary_and_others(jax.lax.stop_gradient(teacher), label, temperature)
    target = kl_divergence(student_binary, teacher_binary, 1.0)
    others = kl_divergence(student_others, teacher_others, temperature)
    alpha, beta = temperature**2 * alpha, temperature**2 * beta  # before a sum that might not exist
    return reduce(factor * (weigh(alpha, target) + weigh(beta, others)), where, reduction, axis_name)
