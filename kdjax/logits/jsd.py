"""Generalised Jensen-Shannon divergence between student and teacher, as GKD trains."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._collectives import class_sum
from kdjax._numerics import (
    NEAR,
    check_classes,
    exp_remainder,
    fraction,
    less_common_error,
    log_ratio,
    positive,
    pulled_back,
    series_of_log1p,
)
from kdjax._reduce import reduce
from kdjax._rowwise import kl_divergence, rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked
from kdjax.logits.reverse_kl import reverse_kl_divergence


@checked
def jsd_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    beta: float = 0.5,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Generalised Jensen–Shannon divergence: student and teacher against their mixture.

    $$\beta\,\mathrm{KL}(q\,\|\,m)+(1-\beta)\,\mathrm{KL}(p\,\|\,m),\qquad m=\beta q+(1-\beta)p,\quad
    p=\mathrm{softmax}(s/T),\quad q=\mathrm{softmax}(t/T)$$

    for 0 < β < 1. With β = 0 it is KL(q‖p), and with β = 1 KL(p‖q), as in the released codes.

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        beta: β from 0 to 1, the teacher's weight in the mixture; a number, because it chooses the formula. The formula
            tends to 0 at both ends, so that the loss jumps there.
        temperature: T > 0; an array has a gradient. There is no factor T².
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        class_axis_name: the mesh axis that the classes are spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree and never negative.
        Between the ends it is at most the entropy of (β, 1 - β), also where one of the two gives -inf to a class that
        the other uses. At the ends it is inf where the KL divergence is.

    Raises:
        ValueError: a β outside 0 to 1, a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit, a β that is an array.

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024,
    https://arxiv.org/abs/2306.13649. In TRL and Liger β is the same weight; in DistiLLM's code the weight is 1 - β.
    Their gradients are NaN if a logit is -inf.

    >>> import jax.numpy as jnp
    >>> from kdjax import jsd_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{jsd_loss(s, t, beta=0.1):.4f}")
    0.0352
    """
    check_classes(student_logits, class_axis_name, axis_name)
    logits = student_logits, teacher_logits
    weight, temperature = fraction("beta", beta, *logits), positive("temperature", temperature, *logits)
    if weight == 0:
        divergence = kl_divergence(*logits, temperature, where=where, class_axis_name=class_axis_name)
    elif weight == 1:
        divergence = reverse_kl_divergence(*logits, temperature, where=where, class_axis_name=class_axis_name)
    else:
        divergence = jensen_shannon(*logits, weight, temperature, where=where, class_axis_name=class_axis_name)
    return reduce(divergence, where, reduction, axis_name)


def jsd_and_gradient(
    x: jax.Array, y: jax.Array, beta: Scalar, temperature: Scalar, class_axis_name: AxisName | None = None
) -> tuple[jax.Array, jax.Array]:
    """The divergence for 0 < b < 1, and its gradient (1 - b) p (h - sum p h) / T, where h = log(p / m).

    If p and q are close, the terms are b q (w - log(1 + w)) + (1 - b) p (w' - log(1 + w')), with w = m / q - 1 and
    w' = m / p - 1. They are never negative, and keep their digits.
    """
    (p, *_), (q, *_), ratio = log_ratio(x, y, temperature, class_axis_name=class_axis_name)
    ratio = jnp.clip(ratio, -1e5, 1e5)  # infinite for a class at -inf in one of the two
    near = jnp.abs(ratio) < NEAR
    close = jnp.where(near, ratio, 0)
    growth = close + exp_remainder(close)
    to_p, rest_p = series_of_log1p(-beta * growth / (1 + growth))
    log_b, log_rest = jnp.log(beta), jnp.log1p(-beta)
    odds = ratio + log_rest - log_b  # log of (1 - b) p / b q
    less = odds < 0
    small = jnp.exp(jnp.where(less, odds, -odds))
    log, rest_q = series_of_log1p(jnp.where(near, (1 - beta) * growth, small))
    # log(m / b q) and log(m / (1 - b) p)
    far_q, far_p = jnp.where(less, log, log + odds), jnp.where(less, log - odds, log)
    terms = jnp.where(
        near,
        beta * q * rest_q + (1 - beta) * p * rest_p,
        -beta * q * (log_b + far_q) - (1 - beta) * p * (log_rest + far_p),
    )
    _, common = less_common_error(jnp.where(near, q * growth, p - q), q, class_axis_name)
    value = class_sum(terms, class_axis_name) - beta * (1 - beta) * common**2 / 2
    # h is log(m / p). For rows with little in common it is nearly log(1 - b), a constant that is then left out
    room = -beta * log_b - (1 - beta) * log_rest - jax.lax.stop_gradient(value)
    apart = room < 0.1 * (beta - 1) * log_rest
    h = jnp.where(near, to_p, far_p + log_rest)
    h = jnp.where(apart, jnp.where(near, to_p - log_rest, far_p), h)
    return jnp.where(value < 0, 0, value).squeeze(-1), (beta - 1) * pulled_back(h, p, class_axis_name) / temperature


jensen_shannon = rowwise(jsd_and_gradient)
