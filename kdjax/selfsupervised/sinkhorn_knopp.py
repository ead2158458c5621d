"""Sinkhorn-Knopp: a teacher's outputs as assignments that use all prototypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._collectives import all_max, all_sum
from kdjax._numerics import HIGHEST, check_classes, positive, promote, softmax, sum_of_rows
from kdjax._reduce import zero_masked
from kdjax._typing import Array, AxisName, Bool, Float, Scalar, checked


@checked
def sinkhorn_knopp(
    teacher_logits: Float[Array, "batch prototypes"],
    *,
    temperature: Scalar,
    iterations: int = 3,
    where: Bool[Array, "batch"] | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Sinkhorn-Knopp: the teacher's softmax, balanced over the batch so that all prototypes are used about equally.

    $$Q_{ik}=\frac{r_i\,e^{t_{ik}/T}\,c_k}{\sum_{k'}r_i\,e^{t_{ik'}/T}\,c_{k'}}$$

    where each iteration first chooses c so that the mass Σ_i Q_ik of every prototype is equal, and then r so that that
    of every sample is 1. After the last step the rows sum to 1, and the prototypes are nearly balanced. This is not a
    loss: pass the result to `dino_loss` and `ibot_loss` as `teacher_targets`, instead of centring.

    Args:
        teacher_logits: `[batch, prototypes]`, of a teacher; constant.
        temperature: T > 0, a constant; DINOv2 uses the warm-up of `dino_teacher_temperature`.
        iterations: how often prototypes and samples are normalised, at least 1.
        where: `[batch]`, False for samples that are left out; their assignments are 0.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        `[batch, prototypes]`, in float32 or float64, without a gradient. A prototype that is -inf in all samples has
        probability 0.

    Raises:
        ValueError: a temperature that is not positive, `iterations` below 1, fewer than 2 prototypes.
        TypeError: a shape or dtype that does not fit.

    Caron et al., *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments* (SwaV), NeurIPS 2020,
    https://arxiv.org/abs/2006.09882. The released codes of SwaV, DINOv2 and DINOv3 take exponentials of t / T, which
    overflow float32 for t ≥ 3.55 at T = 0.04 and then give NaN; this function computes in log space if t / T spans more
    than 60.

    >>> import jax.numpy as jnp
    >>> from kdjax import sinkhorn_knopp
    >>> logits = jnp.array([[2.0, 1.0], [1.0, 0.5]])  # all samples are nearest to the first prototype
    >>> [[round(x, 2) for x in row] for row in sinkhorn_knopp(logits, temperature=0.5).tolist()]
    [[0.62, 0.38], [0.38, 0.62]]
    """
    check_classes(teacher_logits)
    check_iterations(iterations)
    (x,) = promote(jax.lax.stop_gradient(teacher_logits))
    temperature = positive("temperature", temperature, x, constant=True)
    if axis_name is not None:
        return _by_softmaxes(x, temperature, where, iterations, axis_name)
    kept = None if where is None else where[:, None]
    largest, least = x.max(initial=-jnp.inf, where=kept), x.min(initial=jnp.inf, where=kept)
    return jax.lax.cond(
        jnp.isfinite(largest) & (largest - least < SPAN * temperature),
        lambda: _by_products((x - largest) / temperature, where, iterations),
        lambda: _by_softmaxes(x, temperature, where, iterations, axis_name),
    )


SPAN = 60.0  # if logits / T differ by less, exponentials and their products with sums stay in the range of float32


def _by_products(below: jax.Array, where: Array | None, iterations: int) -> jax.Array:
    """The assignments by matrix-vector products, for logits whose exponentials stay in range."""
    weight, rows = zero_masked(where, jnp.exp(below), jnp.ones((below.shape[0], 1), below.dtype))
    for _ in range(iterations):
        columns = 1 / _product(rows.T, weight)
        total = _product(weight, columns.T)
        (rows,) = zero_masked(where, 1 / jnp.where(total == 0, 1, total))
    return weight * columns * rows


def _by_softmaxes(
    x: jax.Array, temperature: Scalar, where: Array | None, iterations: int, axis_name: AxisName | None
) -> jax.Array:
    """The same in logarithms, for any logits."""
    if where is not None:
        x = jnp.where(where[:, None], x, -jnp.inf)
    peak = jnp.maximum(all_max(x.max(0, keepdims=True, initial=-jnp.inf), axis_name), jnp.finfo(x.dtype).min)
    below = (x - peak) / temperature
    mass = all_sum(sum_of_rows(jnp.exp(below)), axis_name)
    log_mass = jnp.log(jnp.where(mass == 0, 1, mass))
    for _ in range(iterations - 1):
        # from the second step on, a column sums to at least 1 / (batch * prototypes), and at most to batch
        mass = all_sum(sum_of_rows(softmax(below - log_mass, may_be_empty=True).p), axis_name)
        log_mass = log_mass + jnp.log(jnp.where(mass == 0, 1, mass))
    p = softmax(below - log_mass, may_be_empty=True).p
    empty = jnp.isneginf(x).all(-1) if where is None else where & jnp.isneginf(x).all(-1)
    return jnp.where(empty[:, None], jnp.nan, p)


def check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}")


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)
