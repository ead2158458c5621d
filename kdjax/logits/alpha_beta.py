"""ABKD's α-β-divergence, whose two exponents include both directions of KL."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._numerics import check_classes, close_log_ratio, finite, of_largest, through_softmax
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked


@checked
def alpha_beta_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""α-β-divergence: a family that includes both directions of KL divergence and what lies between them.

    $$-\frac{1}{\alpha\beta}\sum_c\Big[q_c^\alpha p_c^\beta-\tfrac{\alpha}{\alpha+\beta}q_c^{\alpha+\beta}
    -\tfrac{\beta}{\alpha+\beta}p_c^{\alpha+\beta}\Big],\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    and its limit where α, β or α + β is 0.

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        alpha: α, the teacher's exponent, any finite number. It determines how the loss is computed, so it must be a
            number and not an array. α = 1 with β = 0 is `kl_loss` at temperature 1.
        beta: β, the student's exponent, in the same way. β = 1 with α = 0 is the reverse KL.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree and never negative.
        With α > 0 and β > 0 it is finite, even if one of the two gives -inf to a class that the other uses. With β ≤ 0
        or α + β ≤ 0 it is inf if the student gives -inf to such a class, and with α ≤ 0 or α + β ≤ 0 if the teacher
        does; the gradient leaves infinite terms out. With a negative exponent it grows as a power of 1 / p or 1 / q,
        which may overflow.

    Raises:
        ValueError: an exponent that is not finite, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit, an exponent that is an array.

    Wang, Yang, Zhu, Xu, Huang, *ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation
    via α-β-Divergence*, ICML 2025, https://arxiv.org/abs/2505.04560. If β or α + β is 0, the released code has 1 / α
    where the limit has 1 / α²; if α is 0, it has 1 / β where the limit has 1 / β². There is no temperature: divide both
    logits by it, and multiply the loss by its square.

    >>> import jax.numpy as jnp
    >>> from kdjax import alpha_beta_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{alpha_beta_loss(s, t):.4f}")
    0.3541
    """
    check_classes(student_logits)
    divergence = _alpha_beta(finite("alpha", alpha), finite("beta", beta))
    return reduce(divergence(student_logits, teacher_logits, where=where), where, reduction, axis_name)


def alpha_beta_and_gradient(x: jax.Array, y: jax.Array, alpha: float, beta: float) -> tuple[jax.Array, jax.Array]:
    """The divergence, and its gradient g - p sum g, where g = q^α p^β (e^(α r) - 1) / α and r = log(p / q)."""
    p, q, ratio = close_log_ratio(x, y)
    log_p, log_q = x - p.peak - p.log_total, y - q.peak - q.log_total
    if min(alpha, beta) > 0.05 * (alpha + beta):
        terms, g, rest = _of_powers(log_p, log_q, ratio, alpha, beta)
    else:
        terms, g, rest = _of_limits(log_p, log_q, ratio, alpha, beta)
    if alpha + beta == 1 and alpha > 0:
        # g = (p - q^α p^β) / α; the term p / α does not change the gradient, but hides the rest where q is close to 0
        g = jnp.where(of_largest(p.p, ratio) > 1, rest, g)
    return terms.sum(-1), through_softmax(g, p.p)


def _of_powers(
    log_p: jax.Array, log_q: jax.Array, ratio: jax.Array, alpha: float, beta: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The terms, g, and -q^α p^β / α, from three powers, if neither exponent is small compared with the other."""
    total = alpha + beta
    of_p, of_q, mixed = jnp.exp(total * log_p), jnp.exp(total * log_q), jnp.exp(alpha * log_q + beta * log_p)
    near = total * jnp.abs(ratio) < 1
    far = (alpha / total * of_q + beta / total * of_p - mixed) / (alpha * beta)
    terms = jnp.where(near, of_q * _series(jnp.where(near, ratio, 0), alpha, beta), far)
    fall = jnp.expm1(-alpha * jnp.abs(ratio)) / alpha
    return terms, jnp.where(ratio > 0, -of_p, mixed) * fall, -mixed / alpha


def _of_limits(
    log_p: jax.Array, log_q: jax.Array, ratio: jax.Array, alpha: float, beta: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same for all other exponents.

    Let w be the larger of p and q, to the power α + β, and n = -|r|. A class contributes w ψ(n; α, β) if q is larger
    and w ψ(n; β, α) if p is. So no term is negative, and none is a product of 0 and infinity.
    """
    total = alpha + beta
    both = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    swapped, ratio = ratio > 0, jnp.where(both, 0, ratio)
    n = jnp.where(swapped, -ratio, ratio)
    excluded = jnp.isneginf(n)  # the class is at -inf in one of the two
    n = jnp.where(excluded, 0, n)
    log_w = jnp.where(swapped, log_p, log_q)
    log_w = jnp.where(both, -jnp.inf, total * jnp.where(both, 0, log_w))

    def power(c: float) -> jax.Array:
        """w e^(c n)."""
        return jnp.exp(log_w + c * n) if c else jnp.exp(log_w)

    def growth(c: float, beside: float = 0.0) -> jax.Array:
        """w e^(beside n) (e^(c n) - 1) / c, or its limit at c = 0, without an exponential that overflows."""
        if c == 0:
            return power(beside) * n
        return power(beside + min(c, 0)) * (jnp.expm1(abs(c) * n) / abs(c))

    of_alpha = growth(alpha, beta)
    g = jnp.where(swapped, -growth(alpha), of_alpha)
    terms = jnp.where(swapped, _excess(n, beta, alpha, growth, power), _excess(n, alpha, beta, growth, power))
    if min(alpha, beta, total) < 0:
        terms = jnp.where((n == 0) | jnp.isnan(ratio), ratio, jnp.where(jnp.isnan(terms), jnp.inf, terms))
        g = jnp.where(jnp.isfinite(g) | jnp.isnan(ratio), g, 0)
    w = jnp.exp(log_w)
    terms = jnp.where(excluded, jnp.where(swapped, _limit(w, alpha, total), _limit(w, beta, total)), terms)
    at_zero = jnp.where(swapped, w / alpha if alpha > 0 else 0.0, -w / alpha if beta == 0 < alpha else 0.0)
    rest = jnp.where(excluded, jnp.minimum(at_zero, 0), -jnp.where(swapped, power(alpha), power(beta)) / (alpha or 1))
    return terms, jnp.where(excluded, at_zero, g), rest


def _excess(
    n: jax.Array, a: float, b: float, growth: Callable[..., jax.Array], power: Callable[[float], jax.Array]
) -> jax.Array:
    """w ψ(n; a, b) with ψ = (φ_(a+b) - φ_b) / a = (e^(b n) φ_a - φ_b) / (a + b) and φ_c = (e^(c n) - 1) / c, or limits.

    The first form loses digits if a is small compared with a + b, the second if a + b is small compared with a. Both
    lose digits if n is small; then a series is used.
    """
    total, size = a + b, abs(a) + abs(b)
    if size == 0:
        return power(0.0) * _series(n, a, b)
    near = size * -n < 1
    series = power(0.0) * _series(jnp.where(near, n, 0), a, b)
    far = (growth(total) - growth(b)) / a if abs(a) >= abs(total) else (growth(a, b) - growth(b)) / total
    return jnp.where(near, series, far)


def _series(x: jax.Array, a: float, b: float) -> jax.Array:
    """ψ(x; a, b) for (|a| + |b|) |x| < 1, as a power series."""
    size = (abs(a) + abs(b)) or 1.0
    total, b = (a + b) / size, b / size
    coefficients, of_b = (
        [1.0],
        b,
    )  # the sums of (a + b)^i b^j, without `**`, which compilers do not support for negative bases
    for _ in range((12 if x.dtype == jnp.float32 else 20) - 2):
        coefficients.append(total * coefficients[-1] + of_b)
        of_b = of_b * b
    power, series = size * x, jnp.zeros_like(x)
    for k, coefficient in reversed(list(enumerate(coefficients, 2))):
        series = series * power + coefficient / math.factorial(k)
    return x * x * series


def _limit(w: jax.Array, b: float, total: float) -> jax.Array:
    """w ψ at n = -inf, for a class at -inf in one of the two."""
    return w / (b * total) if b > 0 < total else jnp.full_like(w, jnp.inf)


@functools.cache
def _alpha_beta(alpha: float, beta: float) -> Callable[..., jax.Array]:
    return rowwise(functools.partial(alpha_beta_and_gradient, alpha=alpha, beta=beta))
