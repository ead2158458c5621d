"""KL divergence between the differences of samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather, all_gather_constant, local_rows
from kdjax._numerics import HIGHEST, check_classes, check_fixed, positive, promote, sum_of_rows
from kdjax._reduce import count, reduce, zero_masked
from kdjax._rowwise import kl_divergence
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked

Rows = Callable[[jax.Array], jax.Array]  # takes this device's rows of a gathered array


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
    r"""Difference KL: the differences between the logits of two examples should match the teacher's.

    $$\frac{T^2}{B}\sum_j\mathrm{KL}\big(\mathrm{softmax}((t_i-t_j)/T)\,\|\,\mathrm{softmax}((s_i-s_j)/T)\big)$$

    for example i, over every example j of the batch, i included.

    Args:
        student_logits: `[batch, classes]`.
        teacher_logits: the same shape; constant.
        temperature: T > 0; an array has a gradient.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. A class at -inf in one of two rows is left out of that pair;
        the loss is inf where the student leaves out a class that the teacher uses, and NaN for a row that is -inf
        throughout and for pairs without a class in common, which are no distributions.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's DIFFKLD, whose released code builds every difference, an array `[batch², classes]`. This
    function computes the normalisers of all pairs by matrix products, `[batch, batch]`, unless the logits of an example
    span too wide a range. It subtracts the column means first, which cancel. The limit is about 60 T in float32 and 500
    T in float64; beyond it, the differences are formed a row at a time. If student and teacher are close, the products
    are of exp(d) - 1, so a small loss keeps its precision. Under `vmap` all three ways are computed.

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
    place, both = jnp.arange(len(x)), local(kept)[:, None] & kept[None]
    partners = both & (local(place)[:, None] != place[None])
    by_products = _products_reach(x, y, kept, temperature)
    near = by_products & _are_near(x, y, temperature)

    def harmless(true: jax.Array) -> tuple[jax.Array, jax.Array, Scalar, Rows]:  # vmap evaluates all three ways
        return jnp.where(true, x, 0), jnp.where(true, y, 0), temperature, local

    divergence = jax.lax.cond(
        near,
        lambda: _by_expansion(*harmless(near)),
        lambda: jax.lax.cond(
            by_products, lambda: _by_products(*harmless(by_products)), lambda: _by_rows(x, y, temperature, local)
        ),
    )
    pairs = jnp.where(partners, divergence, 0) + _undefined(x, y, both, local)
    return reduce(temperature**2 * pairs.sum(1) / count(kept, x.dtype), where, reduction, axis_name)


def _center(x: jax.Array, kept: jax.Array) -> jax.Array:
    """The rows minus the column means over kept rows, which do not change differences; masked rows are 0."""
    finite = jnp.where(jnp.isneginf(x), 0, x)
    number = jnp.maximum(sum_of_rows((kept[:, None] & ~jnp.isneginf(x)).astype(x.dtype)), 1)
    return jnp.where(kept[:, None], x - jax.lax.stop_gradient(sum_of_rows(finite / number)), 0)


def _undefined(x: jax.Array, y: jax.Array, both: jax.Array, local: Rows) -> jax.Array:
    """NaN for pairs of rows (also a row with itself) without a common class above -inf, else 0."""

    def nan() -> jax.Array:
        in_x, in_y = ((~jnp.isneginf(z)).astype(x.dtype) for z in (x, y))
        undefined = both & ((_product(local(in_x), in_x) == 0) | (_product(local(in_y), in_y) == 0))
        moved = jax.nn.sigmoid(x).sum(-1)  # depends on every entry, so that the gradient of both rows is NaN
        return jnp.where(undefined, jnp.nan, 0) * (local(moved)[:, None] + moved[None])

    absent = jnp.isneginf(x).any() | jnp.isneginf(y).any()
    return jax.lax.cond(absent, nan, lambda: jnp.where(both, jnp.zeros((), x.dtype), 0))


def _products_reach(x: jax.Array, y: jax.Array, kept: jax.Array, temperature: Scalar) -> jax.Array:
    """Whether matrix products of the exponentials of rows are accurate.

    The largest term of a normaliser is at least exp(-span), or exp(-2 span) if rows have different classes at -inf.
    Terms that underflow must be negligible compared with it.
    """
    x_absent, y_absent = jnp.isneginf(x), jnp.isneginf(y)
    uneven = jnp.any(jnp.stack([(z.any(0) & ~(z | ~kept[:, None]).all(0)).any() for z in (x_absent, y_absent)]))
    span = jnp.maximum(_span(x), _span(y)) * jnp.where(uneven, 2, 1) / temperature
    left_out = x_absent & ~y_absent & ~x_absent.all(-1, keepdims=True)
    return (span < -0.7 * jnp.log(jnp.finfo(x.dtype).tiny)).all() & ~left_out.any()


def _span(x: jax.Array) -> jax.Array:
    return jnp.max(x, -1) - jnp.min(jnp.where(jnp.isneginf(x), jnp.inf, x), -1)


def _are_near(x: jax.Array, y: jax.Array, temperature: Scalar) -> jax.Array:
    """Whether student and teacher are close; then they also have the same classes at -inf."""
    same = (jnp.isneginf(x) == jnp.isneginf(y)).all()
    return same & (jnp.abs(_levelled(_ahead(x, y, temperature))) < 2).all()


def _by_products(x: jax.Array, y: jax.Array, temperature: Scalar, local: Rows) -> jax.Array:
    """KL of all pairs from matrix products.

    KL_ij = E_q[d_i - d_j] - log Z^t_ij + log Z^s_ij with d = (y - x) / T.
    """
    p, q, d = _softmaxes(x, temperature, local), _softmaxes(y, temperature, local), _ahead(x, y, temperature)
    divergence = q.mean(d, -d) + (jnp.log(p.total) - jnp.log(q.total)) + (p.offset - q.offset)
    return divergence + jax.lax.stop_gradient(jnp.maximum(-divergence, 0))


def _by_expansion(x: jax.Array, y: jax.Array, temperature: Scalar, local: Rows) -> jax.Array:
    """The same for student and teacher that are close, from small terms, because the large ones would cancel.

    KL_ij = log(1 + s - m) + m with m = E_q[D], D = d_i - d_j, s = E_q[S], S = exp(-D) - 1 + D, d = (y - x) / T, and
    exp(-D) - 1 = u_i + v_j + u_i v_j, where u = exp(-d) - 1 and v = exp(d) - 1.
    """
    q, d = _softmaxes(y, temperature, local), _levelled(_ahead(x, y, temperature))
    u, v = jnp.expm1(-d), jnp.expm1(d)
    mean, square = q.mean(d, -d), q.mean(u + d, v - d) + q.product(u, v)
    divergence = square + (jnp.log1p(square - mean) - (square - mean))
    return divergence + jax.lax.stop_gradient(jnp.maximum(-divergence, 0))


def _ahead(x: jax.Array, y: jax.Array, temperature: Scalar) -> jax.Array:
    """(y - x) / T; 0 where y is -inf."""
    return jnp.where(jnp.isneginf(y), 0, y - jnp.where(jnp.isneginf(x), 0, x)) / temperature


def _levelled(d: jax.Array) -> jax.Array:
    """The array minus the rows' means, which do not affect a softmax."""
    return d - d.mean(-1, keepdims=True)


class _Softmaxes(NamedTuple):
    """softmax((x_i - x_j) / T) of this device's i and all j, as `rise[i] * fall[j] / total[i, j]`.

    Attributes:
        rise: exp((x - largest) / T) of all rows; 0 for a class at -inf.
        fall: exp((smallest - x) / T) of all rows; 0 for a class at -inf.
        total: `[batch, whole batch]`, the sum over classes of the product.
        offset: (largest_i - smallest_j) / T; added to log(total), it is the logarithm of the normaliser.
        rows: takes this device's rows of a gathered array.
    """

    rise: jax.Array
    fall: jax.Array
    total: jax.Array
    offset: jax.Array
    rows: Rows

    def mean(self, u: jax.Array, v: jax.Array) -> jax.Array:
        """The mean of u_i + v_j."""
        of_u = _product(self.rows(self.rise * u), self.fall)
        return (of_u + _product(self.rows(self.rise), self.fall * v)) / self.total

    def product(self, u: jax.Array, v: jax.Array) -> jax.Array:
        """The mean of u_i v_j."""
        return _product(self.rows(self.rise * u), self.fall * v) / self.total


def _softmaxes(x: jax.Array, temperature: Scalar, local: Rows) -> _Softmaxes:
    absent = jnp.isneginf(x)
    largest = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    smallest = jax.lax.stop_gradient(jnp.min(jnp.where(absent, jnp.inf, x), -1, keepdims=True))
    # -1e5 instead of infinity, which the derivative with respect to T would multiply by 0
    rise, fall = (jnp.exp(jnp.where(absent, -1e5 * temperature, z) / temperature) for z in (x - largest, smallest - x))
    total = _product(local(rise), fall)
    return _Softmaxes(rise, fall, jnp.where(total == 0, 1, total), (local(largest) - smallest.T) / temperature, local)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b.T, precision=HIGHEST)


def _by_rows(x: jax.Array, y: jax.Array, temperature: Scalar, local: Rows) -> jax.Array:
    """KL of all pairs from the differences themselves, one row at a time."""

    @jax.checkpoint
    def row(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        return kl_divergence(_differences(inputs[0], x), _differences(inputs[1], y), temperature)

    return jax.lax.map(row, (local(x), local(y)))


def _differences(row: jax.Array, rows: jax.Array) -> jax.Array:
    row = row[None]
    return jnp.where(jnp.isneginf(row) | jnp.isneginf(rows), -jnp.inf, row - rows)
