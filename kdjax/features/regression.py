"""Feature regression: pulls the student's features towards the teacher's, entry by entry."""

from __future__ import annotations

import jax
import optax

from kdjax._numerics import positive, promote
from kdjax._reduce import reduce, zero_masked
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


@checked
def bce_loss(
    student: Float[Array, "*batch features"],
    teacher: Float[Array, "*batch features"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Sigmoid cross-entropy between features, with the teacher's as targets.

    $$-\tfrac1D\sum_d\left[t_d\log\sigma(s_d)+(1-t_d)\log(1-\sigma(s_d))\right]$$

    Args:
        student: `[*batch, features]`, logits.
        teacher: the same shape; constant. With targets in [0, 1], such as the outputs of a sigmoid, the loss is bounded
            below. With other targets it is not; they are allowed because the founding code uses them.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's BCE, which is PyTorch's `binary_cross_entropy_with_logits`; the value is the same.

    >>> import jax.numpy as jnp
    >>> from kdjax import bce_loss
    >>> s, t = jnp.array([[0.0, 2.0]]), jnp.array([[0.5, 1.0]])
    >>> print(f"{bce_loss(s, t):.4f}")
    0.4100
    """
    student, teacher = zero_masked(where, *promote(student, teacher))
    entries = optax.losses.sigmoid_binary_cross_entropy(student, jax.lax.stop_gradient(teacher))
    return reduce(entries.mean(-1), where, reduction, axis_name)


@checked
def mse_loss(
    student: Float[Array, "*batch features"],
    teacher: Float[Array, "*batch features"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Mean squared error between features.

    $$\tfrac1D\sum_d(s_d-t_d)^2$$

    Args:
        student: `[*batch, features]`.
        teacher: the same shape; constant.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015, https://arxiv.org/abs/1412.6550 (its hint loss is
    half of the sum instead of the mean).

    >>> import jax.numpy as jnp
    >>> from kdjax import mse_loss
    >>> s, t = jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 4.0]])
    >>> print(f"{mse_loss(s, t):.4f}")
    2.5000
    """
    student, teacher = zero_masked(where, *promote(student, teacher))
    entries = optax.losses.squared_error(student, jax.lax.stop_gradient(teacher))
    return reduce(entries.mean(-1), where, reduction, axis_name)


@checked
def smooth_l1_loss(
    student: Float[Array, "*batch features"],
    teacher: Float[Array, "*batch features"],
    *,
    beta: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Smooth L1 error between features: quadratic below β, linear above.

    $$\tfrac1D\sum_d\begin{cases}(s_d-t_d)^2/2\beta&\text{if }|s_d-t_d|<\beta\\|s_d-t_d|-\beta/2&\text{otherwise}\end{cases}$$

    Args:
        student: `[*batch, features]`.
        teacher: the same shape; constant.
        beta: β > 0, where the two pieces meet; a constant. The loss is the Huber loss with δ = β, divided by β.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a β that is not positive, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Girshick, *Fast R-CNN*, ICCV 2015, https://arxiv.org/abs/1504.08083 (β = 1).

    >>> import jax.numpy as jnp
    >>> from kdjax import smooth_l1_loss
    >>> s, t = jnp.array([[0.0, 2.0]]), jnp.array([[0.5, 4.0]])
    >>> print(f"{smooth_l1_loss(s, t):.4f}")
    0.8125
    """
    student, teacher = zero_masked(where, *promote(student, teacher))
    beta = positive("beta", beta, student)
    entries = optax.losses.huber_loss(student, jax.lax.stop_gradient(teacher), delta=beta) / beta
    return reduce(entries.mean(-1), where, reduction, axis_name)
