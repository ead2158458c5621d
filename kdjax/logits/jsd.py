"""Generalised Jensen-Shannon divergence between student and teacher, as GKD trains."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import (
    NEAR,
    check_classes,
    exp_remainder,
    fraction,
    less_common_error,
    log_ratio,
    positive,
    pulled_back,
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

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree and never negative.
        Between the ends it is at most the entropy of (β, 1 - β), also where one of the two gives -inf to a class that
        the other uses. At the ends it is inf where the KL divergence is.

    Raises:
        ValueError: a β outside 0 to 1, a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit, a β that is an array.

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024,
    https://arxiv.org/abs/2306.13649. TRL and Liger weigh as here; in DistiLLM's code the weight is 1 - β. Their
    gradients are NaN where a logit is -inf.

    >>> import jax.numpy as jnp
    >>> from kdjax import jsd_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{jsd_loss(s, t, beta=0.1):.4f}")
    0.0352
    """
    check_classes(student_logits)
    logits = student_logits, teacher_logits
    beta, temperature = fraction("beta", beta, *logits), positive("temperature", temperature, *logits)
    if beta == 0:
        divergence = kl_divergence(*logits, temperature, where=where)
    elif beta == 1:
        divergence = reverse_kl_divergence(*logits, temperature, where=where)
    else:
        divergence = jensen_shannon(*logits, beta, temperature, where=where)
    return reduce(divergence, where, reduction, axis_name)


def jsd_and_gradient(x: jax.Array, y: jax.Array, beta: Scalar, temperature: Scalar) -> tuple[jax.Array, jax.Array]:
    """For 0 < b < 1 the divergence, and its gradient (1 - b) p (h - sum p h) / T with h = log(p / m).

    The mixture is m = (1 - a) f + a g, with the lesser weight a = min(b, 1 - b): f is then the student's p where b < 1/2,
    else the teacher's q. Of f and g the sum is -(1 - a) f u - a g v, with u = log(m / f) and v = log(m / g), and where they
    are close (1 - a) f (e^u - 1 - u) + a g (e^v - 1 - v): terms that are never negative, and keep their digits.
    """
    (p, *_), (q, *_), ratio = log_ratio(x, y, temperature)
    student_first, a = beta < 0.5, jnp.minimum(beta, 1 - beta)
    f, g = jnp.where(student_first, p, q), jnp.where(student_first, q, p)
    alone = (p == 0) | (q == 0)
    ratio = jnp.where(alone, 0, jnp.where(student_first, -ratio, ratio))
    growth = jnp.expm1(jnp.minimum(ratio, 60))
    _, common = less_common_error(jnp.where(alone | (ratio > 1), g - f, f * growth), f)
    small = a * growth < 1
    far = jnp.log(a + (1 - a) * jnp.exp(-jnp.where(small, 0, ratio)))
    log = jnp.log1p(a * jnp.where(small, growth, 0))
    u, v = jnp.where(small, log, far + ratio), jnp.where(small, log - ratio, far)
    near = jnp.abs(ratio) < NEAR
    close_u, close_v = (exp_remainder(jnp.where(near, z, 0)) for z in (u, v))
    terms = jnp.where(near, (1 - a) * f * close_u + a * g * close_v, -(1 - a) * f * u - a * g * v)
    apart = -beta * jnp.log(beta) * q - (1 - beta) * jnp.log1p(-beta) * p
    to_p = jnp.where(q == 0, jnp.log1p(-beta), jnp.where(student_first, u, v))
    value = jnp.where(alone, apart, terms).sum(-1) - a * (1 - a) * common.squeeze(-1) ** 2 / 2
    return jnp.where(value < 0, 0, value), (beta - 1) * pulled_back(to_p, p) / temperature


jensen_shannon = rowwise(jsd_and_gradient)
