"""KL divergence between the differences of samples."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather, all_gather_constant, local_rows
from kdjax._numerics import HIGHEST, check_classes, check_fixed, positive, promote
from kdjax._reduce import count, reduce, zero_masked
from kdjax._rowwise import kl_divergence
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked

Rows = Callable[[jax.Array], jax.Array]  # this device's rows of all


@checked
def difference_kl_loss(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Difference KL: how one sample's logits differ from another's is drawn to how the teacher's do.

    $$\frac{T^2}{B}\sum_j\mathrm{KL}\big(\mathrm{softmax}((t_i-t_j)/T)\,\|\,\mathrm{softmax}((s_i-s_j)/T)\big)$$

    for sample i, over every sample j of the batch, i among them.

    Args:
        student_logits: `[batch, classes]`.
        teacher_logits: the same shape; constant, its gradient is 0.
        temperature: T > 0.
        where: `[batch]`, False for examples that count for nothing, neither as i nor as j.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"` for `[batch]`, the mean over partners of each.
        axis_name: inside `shard_map`, the mesh axis that the batch is spread over; the mean over devices of what they
            return is then the loss of the whole batch.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. A class at -inf in one of two rows is left out of that pair;
        the loss is inf where the student leaves out a class that the teacher uses.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's DIFFKLD, whose released code builds every difference, an array of `[batch², classes]`.
    Here the normalisers of all pairs are matrix products, in `[batch, batch]`, as long as no row spans more than
    about 60 T in float32 (500 T in float64) once the column means, which cancel, are taken out; beyond, the differences
    are formed a row at a time. Where student and teacher are near, the products are of exp(d) - 1, so that a small loss
    keeps its digits. Under `vmap` all three are computed.

    >>> import jax.numpy as jnp
    >>> from kdjax import difference_kl_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> t = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(f"{difference_kl_loss(s, t):.4f}")
    0.0204
    """
    check_fixed("difference_kl_loss", batch=student_logits.shape[0])
    student, teacher = zero_masked(where, *promote(student_logits, teacher_logits))
    check_classes(student)
    temperature = positive("temperature", temperature, student)
    local = functools.partial(local_rows, rows=len(student), axis_name=axis_name)
    student, teacher = all_gather(student, axis_name), all_gather_constant(teacher, axis_name)
    kept = jnp.ones(len(student), bool) if where is None else all_gather_constant(where, axis_name)
    x, y = _center(student, kept), _center(teacher, kept)

    limit = -0.7 * jnp.log(jnp.finfo(x.dtype).tiny) * temperature
    left_out = jnp.isneginf(x) & ~jnp.isneginf(y)
    narrow = (_span(x) < limit).all() & (_span(y) < limit).all() & ~left_out.any()
    near = narrow & (jnp.abs(_levelled(_ahead(x, y, temperature))) < 4).all()

    def harmless(
        true: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Scalar]:  # vmap evaluates all three, on harmless values
        return jnp.where(true, x, 0), jnp.where(true, y, 0), temperature

    divergence = jax.lax.switch(
        narrow.astype(int) + near.astype(int),
        (
            lambda: _by_rows(x, y, temperature, local),
            lambda: _by_products(*harmless(narrow), local),
            lambda: _by_expansion(*harmless(near), local),
        ),
    )
    place = jnp.arange(len(x))
    pairs = jnp.where(kept[None] & (local(place)[:, None] != place[None]), divergence, 0)
    return reduce(temperature**2 * pairs.sum(1) / count(kept, x.dtype), where, reduction, axis_name)


def _center(x: jax.Array, kept: jax.Array) -> jax.Array:
    """Without the column means over kept rows, which no difference feels; masked rows are 0."""
    finite = jnp.where(jnp.isneginf(x), 0, x)
    number = jnp.maximum((kept[:, None] & ~jnp.isneginf(x)).sum(0, keepdims=True, dtype=x.dtype), 1)
    return jnp.where(kept[:, None], x - jax.lax.stop_gradient((finite / number).sum(0, keepdims=True)), 0)


def _span(x: jax.Array) -> jax.Array:
    return jnp.max(x, -1) - jnp.min(jnp.where(jnp.isneginf(x), jnp.max(x, -1, keepdims=True), x), -1)


def _by_products(x: jax.Array, y: jax.Array, temperature: Scalar, local: Rows) -> jax.Array:
    """KL of all pairs from products of matrices: log Z_ij is a product of exponentials of the two rows.

    KL_ij = sum_k q_ijk (d_ik - d_jk) - log Z^t_ij + log Z^s_ij with d = (y - x) / T.
    """
    e_x, f_x, offset_x = _exponentials(x, temperature, local)
    e_y, f_y, offset_y = _exponentials(y, temperature, local)
    z_x, z_y = _product(local, e_x, f_x), _product(local, e_y, f_y)
    d = _ahead(x, y, temperature)
    mean = (_product(local, e_y * d, f_y) - _product(local, e_y, f_y * d)) / z_y
    divergence = mean + (jnp.log(z_x) - jnp.log(z_y)) + (offset_x - offset_y)
    return divergence + jax.lax.stop_gradient(jnp.maximum(-divergence, 0))


def _by_expansion(x: jax.Array, y: jax.Array, temperature: Scalar, local: Rows) -> jax.Array:
    """The same where student and teacher are near, so that its terms would cancel: small ones from the start.

    KL_ij = log(1 + s - m) + m with m = E_q[d_i - d_j], s = E_q[exp(d_j - d_i) - 1 + d_i - d_j], d = (y - x) / T, and
    exp(d_j - d_i) - 1 = u_i + v_j + u_i v_j of u = exp(-d) - 1, v = exp(d) - 1.
    """
    e, f, _ = _exponentials(y, temperature, local)
    d = _levelled(_ahead(x, y, temperature))
    u, v = jnp.expm1(-d), jnp.expm1(d)
    z = _product(local, e, f)
    mean = (_product(local, e * d, f) - _product(local, e, f * d)) / z
    square = (_product(local, e * (u + d), f) + _product(local, e, f * (v - d)) + _product(local, e * u, f * v)) / z
    divergence = square + (jnp.log1p(square - mean) - (square - mean))
    return divergence + jax.lax.stop_gradient(jnp.maximum(-divergence, 0))


def _ahead(x: jax.Array, y: jax.Array, temperature: Scalar) -> jax.Array:
    """(y - x) / T; 0 where y is -inf."""
    return jnp.where(jnp.isneginf(y), 0, y - jnp.where(jnp.isneginf(x), 0, x)) / temperature


def _levelled(d: jax.Array) -> jax.Array:
    """Without the rows' means, which no softmax feels."""
    return d - d.mean(-1, keepdims=True)


def _exponentials(x: jax.Array, temperature: Scalar, local: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """exp((x - max)/T), exp((min - x)/T) and (max_i - min_j)/T; a class at -inf is 0 in both."""
    left_out = jnp.isneginf(x)
    largest = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    smallest = jax.lax.stop_gradient(jnp.min(jnp.where(left_out, largest, x), -1, keepdims=True))
    fall = jnp.where(left_out, 0, jnp.exp((smallest - jnp.where(left_out, smallest, x)) / temperature))
    return jnp.exp((x - largest) / temperature), fall, (local(largest) - smallest.T) / temperature


def _product(local: Rows, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(local(a), b.T, precision=HIGHEST)


def _by_rows(x: jax.Array, y: jax.Array, temperature: Scalar, local: Rows) -> jax.Array:
    """KL of all pairs from the differences themselves, a row at a time."""

    @jax.checkpoint
    def row(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        return kl_divergence(_differences(inputs[0], x), _differences(inputs[1], y), temperature)

    return jax.lax.map(row, (local(x), local(y)))


def _differences(row: jax.Array, rows: jax.Array) -> jax.Array:
    row = row[None]
    return jnp.where(jnp.isneginf(row) | jnp.isneginf(rows), -jnp.inf, row - rows)
