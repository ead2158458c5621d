"""KL divergence estimated from sampled tokens: on-policy distillation where only the tokens' log-probabilities are known."""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from kdjax._numerics import NEAR, exp_remainder, positive
from kdjax._reduce import reduce, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


@checked
def sampled_kl_loss(
    student_log_probs: Float[Array, "*batch"],
    teacher_log_probs: Float[Array, "*batch"],
    behavior_log_probs: Float[Array, "*batch"] | None = None,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    sampled_from: Literal["student", "teacher"] = "student",
    gradient: Literal["score", "direct"] | None = None,
    max_ratio: Scalar | None = None,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""On-policy distillation from sampled tokens: a KL divergence, estimated from only the tokens' log-probabilities.

    $$w\,k,\qquad k_1=y,\quad k_2=\tfrac{y^2}{2},\quad k_3=e^{-y}-1+y,\qquad w=\min(p/b,\,m)$$

    where p, q and b are the probabilities that the student, the teacher and the sampling policy give to a token, and m
    is `max_ratio`. For tokens that the student sampled y = log p − log q, and the mean estimates KL(p‖q); for the
    teacher's tokens y = log q − log p, and the mean estimates KL(q‖p). Without b, w = 1.

    Args:
        student_log_probs: `[*batch]`, log p, at most 0: one number per token, as in `[batch, tokens]`.
        teacher_log_probs: the same shape, log q of the same tokens; constant.
        behavior_log_probs: the same shape, log b; constant. It corrects for tokens that were sampled from an older
            student or by another engine. Do not pass it with `sampled_from="teacher"`: w would reweight the teacher's
            tokens to the student's distribution.
        estimator: `"k1"`, `"k2"` or `"k3"`. On the student's tokens k1 and k3 have the mean KL(p‖q); k3 is never
            negative, and varies less where p and q are close. k2 has a different mean, which is close to KL(p‖q) if p
            and q are close.
        sampled_from: which model sampled the tokens, `"student"` or `"teacher"`.
        gradient: `"score"`, w (log p − log q) times the gradient of log p for any estimator, whose mean over the
            student's tokens is the gradient of KL(p‖q); or `"direct"`, the derivative of the value with constant w.
            None means the score for the student's tokens, and direct for the teacher's tokens, for which the score is
            not defined.
        max_ratio: m > 0, the largest w; a constant. It needs `behavior_log_probs`.
        where: `[*batch]`, False for tokens that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. k2 and k3 are never negative. It is inf if one model gives -inf
        to a token of the other, and NaN if a model gives -inf to a token that it has sampled itself.

    Raises:
        ValueError: an unknown estimator, source, gradient or reduction, the score for the teacher's tokens, a
            `max_ratio` that is not positive or comes without `behavior_log_probs`.
        TypeError: a shape or dtype that does not fit.

    A number that exceeds 0 by more than rounding (10⁻⁴, more in half precision) cannot be the logarithm of a
    probability. kdtorch raises a ValueError in eager code on a CPU; elsewhere, and in kdjax, the value of its token is
    NaN.

    The direct gradient on the student's own tokens is not the gradient of the estimated divergence. For k1 its mean is
    0, and training has no effect. For k3 its mean is the gradient of KL(q‖p), the other direction. For k2 it equals the
    score.

    Schulman, *Approximating KL Divergence*, 2020, https://joschu.net/blog/kl-approx.html; Lu and Thinking Machines Lab,
    *On-Policy Distillation*, 2025, https://thinkingmachines.ai/blog/on-policy-distillation. Released codes differ in
    the gradient: slime and Tinker take −k1 as a reward, which is the score; TorchRL differentiates k3.

    >>> import jax.numpy as jnp
    >>> from kdjax import sampled_kl_loss
    >>> s, t = jnp.array([-0.5, -2.0, -1.0]), jnp.array([-0.7, -1.0, -3.0])
    >>> print(f"{sampled_kl_loss(s, t):.4f}")
    0.6241
    """
    for name, value, known in (
        ("estimator", estimator, ("k1", "k2", "k3")),
        ("sampled_from", sampled_from, ("student", "teacher")),
        ("gradient", gradient, ("score", "direct", None)),
    ):
        if value not in known:
            choices = ", ".join("None" if x is None else f'"{x}"' for x in known)
            raise ValueError(f"`{name}` must be one of {choices}, got {value!r}")
    if gradient == "score" and sampled_from == "teacher":
        raise ValueError(
            '`gradient` must be "direct" or None with sampled_from="teacher", got \'score\'; the score is a gradient of '
            "the student's own tokens"
        )
    if max_ratio is not None:
        if behavior_log_probs is None:
            raise ValueError(
                "`behavior_log_probs` must be given with `max_ratio`, got None; give the log-probabilities of the policy "
                "that sampled the tokens, or leave `max_ratio` out"
            )
        max_ratio = positive("max_ratio", max_ratio, student_log_probs, constant=True)
    rows = [
        None if x is None else _at_most_zero(x, where)[..., None]
        for x in (student_log_probs, teacher_log_probs, behavior_log_probs)
    ]
    slope = gradient or ("score" if sampled_from == "student" else "direct")
    return reduce(_SAMPLED[estimator, sampled_from, slope](*rows, max_ratio, where=where), where, reduction, axis_name)


def _at_most_zero(x: Array, where: Array | None) -> jax.Array:
    """Log-probabilities; NaN where one exceeds 0 by more than rounding."""
    (x,) = zero_masked(where, x)
    above = jax.lax.stop_gradient(x) > max(1e-4, 16 * float(jnp.finfo(x.dtype).eps))
    return x + jnp.where(above, jnp.nan, 0).astype(x.dtype)


def sampled_and_gradient(
    estimator: str,
    sampled_from: str,
    gradient: str,
    x: jax.Array,
    y: jax.Array,
    behavior: jax.Array | None,
    max_ratio: Scalar | None,
) -> tuple[jax.Array, jax.Array]:
    """The estimate of each token, in rows of one number, and its gradient with respect to x; z is log(q / p), or log(p / q)."""
    z = y - x if sampled_from == "student" else x - y
    z = jnp.where(jnp.isposinf(z), jnp.nan, z)  # the model that sampled the token gives it probability 0
    log_weight, log_product = _log_weight(
        sampled_from, jax.lax.stop_gradient(x), y, jax.lax.stop_gradient(z), behavior, max_ratio
    )
    weight = jnp.exp(log_weight)
    weight = jnp.where(z == 0, jnp.minimum(weight, jnp.finfo(x.dtype).max), weight)  # 0 times a large one is 0
    weight = jnp.where(jnp.isnan(z), z, weight)
    if estimator == "k1":
        value, slope = -weight * z, -weight
    elif estimator == "k2":
        value, slope = weight * z * z / 2, weight * _bounded(z)
    else:
        value, slope = _k3(z, weight, log_product)
    if gradient == "score":
        slope = weight * _bounded(jax.lax.stop_gradient(z))
    value = jnp.where(jnp.isneginf(z) & (weight == 0), jnp.inf, value)
    return value.sum(-1), -slope if sampled_from == "student" else slope


def _log_weight(
    sampled_from: str, x: jax.Array, y: jax.Array, z: jax.Array, behavior: jax.Array | None, max_ratio: Scalar | None
) -> tuple[jax.Array, jax.Array]:
    """log w, and z + log w computed without large intermediate numbers. A token with log b = -inf gives NaN."""
    if behavior is None:
        return jnp.zeros_like(x), z
    log_weight = jnp.where(jnp.isneginf(behavior), jnp.nan, x - behavior)
    log_product = y - behavior if sampled_from == "student" else z + log_weight
    if max_ratio is None:
        return log_weight, log_product
    most = jnp.log(jnp.asarray(max_ratio, x.dtype))
    return jnp.minimum(log_weight, most), jnp.minimum(log_product, z + most)


def _bounded(z: jax.Array) -> jax.Array:
    """z; a token with probability 0 in the other model counts as if its log-probability were the lowest number."""
    return jnp.where(jnp.isneginf(z), math.log(jnp.finfo(z.dtype).tiny), z)


def _k3(z: jax.Array, weight: jax.Array, log_product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """w (e^z - 1 - z) and its derivative w (e^z - 1). If e^z is large, w e^z is computed as e^(z + log w)."""
    far = z > 2
    moderate, large = jnp.where(far, 0, z), jnp.where(far, z, 0)
    near = jnp.abs(moderate) < NEAR
    close = exp_remainder(jnp.where(near, moderate, 0))
    beyond = jnp.where(near, close, jnp.expm1(moderate) - moderate)
    product = jnp.exp(jnp.where(far, log_product, 0)) * (1 + (large - jax.lax.stop_gradient(large)))  # w is constant
    value = jnp.where(far, product * (1 - (1 + large) * jnp.exp(-large)), weight * beyond)
    return value, jnp.where(far, -product * jnp.expm1(-large), weight * jnp.expm1(moderate))


_SAMPLED = {
    (estimator, sampled_from, gradient): rowwise(
        functools.partial(sampled_and_gradient, estimator, sampled_from, gradient)
    )
    for estimator in ("k1", "k2", "k3")
    for sampled_from, gradient in (("student", "score"), ("student", "direct"), ("teacher", "direct"))
}
