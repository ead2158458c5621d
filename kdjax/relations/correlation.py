"""Compares the kernels between samples of student and teacher."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._numerics import positive, unit
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked
from kdjax.relations._pairs import Pairs, over_pairs, products
from kdlosses.settings import whole


@checked
def correlation_loss(
    student: Float[Array, "batch student_dim"],
    teacher: Float[Array, "batch teacher_dim"],
    *,
    gamma: Scalar = 0.4,
    order: int = 2,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Correlation congruence: mean squared error between two matrices of a Gaussian kernel, expanded in a Taylor series.

    $$\frac1B\sum_j\big(K_{ij}(s)-K_{ij}(t)\big)^2,\qquad K_{ij}(x)=e^{-2\gamma}\sum_{n=0}^P\frac{(2\gamma\cos(x_i,x_j))^n}{n!}$$

    for example i, over every example j of the batch, i included.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        gamma: γ > 0, of the kernel exp(-γ‖x − y‖²) on unit rows; the larger, the narrower.
        order: P ≥ 1, the last power of the series.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. A zero row has cosine 0 with every row, itself included, with
        gradient 0.

    Raises:
        ValueError: a `gamma` that is not positive, an `order` that is not a whole number of at least 1, an unknown
            reduction.
        TypeError: a shape or dtype that does not fit.

    Peng et al., *Correlation Congruence for Knowledge Distillation*, ICCV 2019, https://arxiv.org/abs/1904.01802, which
    weights this loss by 0.003. The losses of this name in RepDistiller and torchdistill are different: RepDistiller's
    compares products of differences of neighbours in the batch.

    >>> import jax.numpy as jnp
    >>> from kdjax import correlation_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> t = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{correlation_loss(s, t):.4f}")
    0.1266
    """
    whole(1, order=order)
    gamma = positive("gamma", gamma, student, teacher, constant=True)

    def values(pairs: Pairs) -> jax.Array:
        cosine, other = (_cosines(unit(x), pairs.local) for x in (pairs.student, pairs.teacher))
        gap = _kernel(cosine, gamma, order) - _kernel(other, gamma, order)
        return pairs.mean(jnp.square(gap))

    return over_pairs("correlation_loss", values, student, teacher, where, reduction, axis_name)


def _cosines(x: jax.Array, local: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The cosines of this device's rows with all rows, given unit rows; 1 for a row with itself, 0 for a row of 0."""
    place, product = jnp.arange(len(x)), products(x, local)
    itself = local((x != 0).any(-1).astype(x.dtype))
    return jnp.where(local(place)[:, None] == place[None], itself[:, None], product)


def _kernel(cosine: jax.Array, gamma: float | jax.Array, order: int) -> jax.Array:
    """The kernel without its constant term, which cancels, by Horner's rule."""
    gamma = jnp.asarray(gamma, cosine.dtype)
    factors = [jnp.exp(-2 * gamma)]
    for n in range(1, order + 1):
        factors.append(factors[-1] * (2 * gamma / n))
    total = jnp.zeros_like(cosine)
    for factor in factors[:0:-1]:
        total = total * cosine + factor
    return total * cosine
