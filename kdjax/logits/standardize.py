"""Standardised logits, as inputs of logit losses, so that the scale of the teacher's logits is not distilled."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import check_classes, positive, promote
from kdjax._typing import Array, Float, Scalar, checked


@checked
def standardize_logits(
    logits: Float[Array, "*batch classes"],
    *,
    temperature: Scalar = 1.0,
) -> jax.Array:
    r"""Logits with mean 0 and standard deviation 1 over the classes of each example, divided by T.

    $$\frac{z-\bar z}{(\sigma+10^{-7})\,T},\qquad \sigma^2=\frac1{C-1}\sum_c(z_c-\bar z)^2$$

    This is not a loss: apply it to the logits of student and teacher, and pass the results to a logit loss.

    Args:
        logits: `[*batch, classes]`, of student or teacher. The function is differentiable; a loss stops the gradient of
            the teacher.
        temperature: T > 0; an array has a gradient.

    Returns:
        An array of the shape of `logits`, in float32 or float64. A class at -inf stays at -inf and is left out of the
        mean, σ and C. If fewer than 2 classes are left, the results are 0. A constant row becomes 0 too; its gradient
        is 10⁷ / T times that of subtracting the mean.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes.
        TypeError: a shape or dtype that does not fit.

    Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024, https://arxiv.org/abs/2403.01427. The
    authors' loss is `9 * kl_loss(standardize_logits(s), standardize_logits(t), temperature=2.0)`. For σ their code
    divides by C - 1, as this function does; the paper divides by C.

    >>> import jax.numpy as jnp
    >>> from kdjax import standardize_logits
    >>> print([round(x, 4) for x in standardize_logits(jnp.array([3.0, 0.0, 6.0, 3.0]), temperature=2.0).tolist()])
    [0.0, -0.6124, 0.6124, 0.0]
    """
    check_classes(logits)
    logits = jnp.asarray(logits)
    temperature = positive("temperature", temperature, logits)
    return standardized(logits, temperature)


# computed again in the backward pass, so that only the logits are stored until then
@jax.checkpoint
def standardized(x: jax.Array, temperature: Scalar) -> jax.Array:
    (x,) = promote(x)
    centered, deviation = _centered(x)
    return jnp.where(jnp.isneginf(x), -jnp.inf, centered / deviation / temperature)


def _centered(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits minus their mean (0 for a class at -inf), and the standard deviation plus 1e-7, both divided by 8.

    The largest entry is subtracted first, so that a constant row becomes exactly 0; only numbers up to 1 are squared.
    The division by 8 keeps the difference of two finite numbers and the reciprocal of the deviation in range.
    """
    x, absent = x / 8, jnp.isneginf(x)
    number = (~absent).sum(-1, keepdims=True, dtype=x.dtype)
    peak = jax.lax.stop_gradient(jnp.maximum(x.max(-1, keepdims=True), jnp.finfo(x.dtype).min))
    below = jnp.where(absent, 0, x - peak)
    centered = jnp.where(absent, 0, below - below.sum(-1, keepdims=True) / jnp.maximum(number, 1))
    scale = jax.lax.stop_gradient(jnp.abs(centered).max(-1, keepdims=True))
    zero = scale < jnp.finfo(x.dtype).tiny
    square = jnp.square(centered / jnp.where(zero, 1, scale)).sum(-1, keepdims=True)
    deviation = scale * jnp.sqrt(jnp.where(zero, 1, square) / jnp.maximum(number - 1, 1))
    return centered, jnp.where(zero, 0, deviation) + 1e-7 / 8
