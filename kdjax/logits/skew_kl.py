"""KL divergence to a mixture of the two distributions: DistiLLM's skewed divergences."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import (
    check_classes,
    close_log_ratio,
    fraction,
    less_log1p,
    of_largest,
    through_softmax,
)
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


@checked
def skew_kl_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    skew: Scalar = 0.1,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Skewed KL divergence: from the teacher to a mixture of the teacher and the student.

    $$\mathrm{KL}\big(q\,\|\,kq+(1-k)p\big),\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        skew: k from 0 to 1, the teacher's part of the mixture. At 0 the loss is `kl_loss` at temperature 1, at 1 it is 0.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree, never negative, and at
        most -log k, even if the student gives -inf to a class that the teacher uses. With k = 0 it is then inf.

    Raises:
        ValueError: a skew that is not between 0 and 1, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Ko, Kim, Chen, Yun, *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
    https://arxiv.org/abs/2402.03898. The skew is the weight of the first argument of the divergence, which is the
    teacher in this function and the student in `skew_reverse_kl_loss`. The released code returns the cross-entropy of
    the teacher and the mixture, which has the same gradient and is larger by the teacher's entropy. There is no
    temperature, as in the paper: divide both logits by it, and multiply the loss by its square.

    >>> import jax.numpy as jnp
    >>> from kdjax import skew_kl_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{skew_kl_loss(s, t):.4f}")
    0.3029
    """
    check_classes(student_logits)
    skew = fraction("skew", skew, student_logits, teacher_logits)
    return reduce(_skew_kl(student_logits, teacher_logits, skew, where=where), where, reduction, axis_name)


@checked
def skew_reverse_kl_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    skew: Scalar = 0.1,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Skewed reverse KL divergence: from the student to a mixture of the student and the teacher.

    $$\mathrm{KL}\big(p\,\|\,kp+(1-k)q\big),\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        skew: k from 0 to 1, the student's part of the mixture. At 0 the loss is the reverse KL, at 1 it is 0.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree, never negative, and at
        most -log k, even if the teacher gives -inf to a class that the student uses. With k = 0 it is then inf, and the
        gradient leaves that class out.

    Raises:
        ValueError: a skew that is not between 0 and 1, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Ko, Kim, Chen, Yun, *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024,
    https://arxiv.org/abs/2402.03898. The skew is the weight of the first argument of the divergence, which is the
    student in this function and the teacher in `skew_kl_loss`.

    >>> import jax.numpy as jnp
    >>> from kdjax import skew_reverse_kl_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{skew_reverse_kl_loss(s, t):.4f}")
    0.2637
    """
    check_classes(student_logits)
    skew = fraction("skew", skew, student_logits, teacher_logits)
    return reduce(_skew_reverse_kl(student_logits, teacher_logits, skew, where=where), where, reduction, axis_name)


def skew_kl_and_gradient(x: jax.Array, y: jax.Array, skew: Scalar) -> tuple[jax.Array, jax.Array]:
    """KL(q || m) with m = k q + (1 - k) p, and its gradient p (h - sum p h) with h = -(1 - k) q / m.

    If the teacher gives the student's largest class nearly the same probability, 1 - k is added to h, which makes it
    small.
    """
    (p, *_), (q, *_), ratio = close_log_ratio(x, y)
    apart = of_largest(p, ratio) > 1
    ratio = jnp.where(q == 0, 0, ratio)
    near, z = _growth(q, ratio, skew)
    taken = q * jax.nn.sigmoid(_log_odds(ratio, skew))  # (1 - k) p q / m
    given = jnp.where(near, (1 - skew) * p * (z / (1 + z)), (1 - skew) * p - taken)
    return _kl_to_mixture(q, p, ratio, skew), through_softmax(jnp.where(apart, -taken, given), p)


def skew_reverse_kl_and_gradient(x: jax.Array, y: jax.Array, skew: Scalar) -> tuple[jax.Array, jax.Array]:
    """KL(p || m) with m = k p + (1 - k) q, and its gradient p (h - sum p h) with h = log(p / m) - k p / m.

    A constant that makes h small is added to it: k if the teacher gives the student's largest class nearly the same
    probability, and 1 + log k if the teacher gives it nearly none.
    """
    (p, *_), (q, *_), ratio = close_log_ratio(x, y)
    apart = of_largest(p, ratio) > jnp.maximum(1, _log_odds(0.0, skew))
    ratio = jnp.where(p == 0, 0, -ratio)
    near, z = _growth(p, ratio, skew)
    log_odds = _log_odds(ratio, skew)
    other = jax.nn.sigmoid(log_odds)  # (1 - k) q / m
    z = jnp.where(z < 1, z, 0)
    agreeing = (skew - 1) * z / (1 + z) - less_log1p(-z / (1 + z))
    h = jnp.where(near & (z != 0), agreeing, skew - 1 + other - _log_growth(ratio, skew))
    small = other < 0.25
    alone = jnp.where(small, -less_log1p(-jnp.where(small, other, 0)), other + jax.nn.log_sigmoid(-log_odds))
    h = jnp.where(apart, alone, h)
    return _kl_to_mixture(p, q, ratio, skew), through_softmax(p * jnp.where(jnp.isposinf(h), 0, h), p)


def _kl_to_mixture(q: jax.Array, p: jax.Array, ratio: jax.Array, skew: Scalar) -> jax.Array:
    """KL(q || m) with m = k q + (1 - k) p, given log(p / q). Its terms m - q - q log(m / q) are never negative."""
    near, z = _growth(q, ratio, skew)
    far = (1 - skew) * (p - q) - q * jnp.where(q == 0, 0, _log_growth(ratio, skew))
    value = jnp.where(near, q * less_log1p(z), far).sum(-1)
    return jnp.where(value < 0, 0, value)


def _growth(q: jax.Array, ratio: jax.Array, skew: Scalar) -> tuple[jax.Array, jax.Array]:
    """Where m / q - 1 with m = k q + (1 - k) p is finite and not close to -1, and its values there."""
    z = (1 - skew) * jnp.expm1(jnp.minimum(ratio, 20))
    near = (q > 0) & (ratio < 20) & (z > -0.5)
    return near, jnp.where(near, z, 0)


def _log_growth(ratio: jax.Array, skew: Scalar) -> jax.Array:
    """log(m / q) = log(k + (1 - k) p / q), computed without m, which could be 0."""
    return jnp.logaddexp(jnp.log(skew), jnp.log1p(-skew) + ratio)


def _log_odds(ratio: Scalar, skew: Scalar) -> jax.Array:
    """The logarithm of (1 - k) p / (k q), given log(p / q): infinite at k = 0 and at k = 1, and never NaN."""
    return jnp.log1p(-skew) - jnp.log(skew) + jnp.clip(ratio, -1e5, 1e5)


_skew_kl = rowwise(skew_kl_and_gradient)
_skew_reverse_kl = rowwise(skew_reverse_kl_and_gradient)
