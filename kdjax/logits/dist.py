"""Compares the correlations between classes and between samples of student and teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kdjax._collectives import all_sum, size
from kdjax._numerics import HIGHEST, check_classes, non_negative, positive, promote, pulled_back, softmax, softmaxes
from kdjax._reduce import check_reduction, count, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


@checked
def dist_loss(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-8,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""DIST: the classes of each example, and the examples of each class, should correlate with the teacher's.

    $$T^2\left[\beta\left(1-\frac1B\sum_i\rho(p_i,q_i)\right)+\gamma\left(1-\frac1C\sum_c\rho(p^c,q^c)\right)\right],\qquad
    \rho(x,y)=\frac{(x-\bar x)\cdot(y-\bar y)}{\|x-\bar x\|\,\|y-\bar y\|+\varepsilon}$$

    for p = softmax(s/T) and q = softmax(t/T). Their rows are the examples, and their columns p^c and q^c are the
    classes. Pearson's correlation ρ does not depend on mean and scale, so a student that is far weaker than its teacher
    can match it.

    Args:
        student_logits: `[batch, classes]`.
        teacher_logits: the same shape; constant.
        beta: weight of the relations between classes, one for each example; a constant.
        gamma: weight of the relations between examples, one for each class; a constant.
        temperature: T > 0; an array has a gradient.
        eps: ε > 0, which is added to the product of the norms; a constant.
        where: `[batch]`, False for examples that are left out, also from the relations of the classes.
        reduction: `"mean"`, or `"sum"`, which is the mean times the number of kept examples; `"none"` is an error.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, at most 2 T² (β + γ). Because of ε it is not exactly 0 if student and teacher are equal. With one
        example the second term is γT². A class at -inf in both, in every example, is left out of C and of the means.

    Raises:
        ValueError: a temperature or ε that is not positive, a negative weight, fewer than 2 classes, an unknown
            reduction, or `"none"`, because the relation of a class belongs to the whole batch and not to single
            examples.
        TypeError: a shape or dtype that does not fit.

    Huang et al., *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022, https://arxiv.org/abs/2205.10536. As
    in the released code, ε changes the value and does not only prevent a division by zero: with many classes each has
    little probability, so the product of the norms may be below ε, and the relation near 0 even if student and teacher
    are equal. If they are close, 1 - ρ is computed from their difference, so a small loss keeps its digits.

    >>> import jax.numpy as jnp
    >>> from kdjax import dist_loss
    >>> s = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    >>> t = jnp.array([[1.0, 1.0, -1.0], [0.0, 2.0, 0.0]])
    >>> print(f"{dist_loss(s, t):.4f}")
    0.2518
    """
    check_classes(student_logits)
    check_of_batch(reduction)
    inputs = promote(student_logits, teacher_logits)
    temperature = positive("temperature", temperature, *inputs)
    weights = non_negative("beta", beta, *inputs), non_negative("gamma", gamma, *inputs)
    eps = positive("eps", eps, *inputs, constant=True)
    value = _of_batch(axis_name)(student_logits, teacher_logits, temperature, where, *weights, eps)
    return value * _number(student_logits, where, value.dtype, axis_name) if reduction == "sum" else value


def check_of_batch(reduction: str) -> None:
    check_reduction(reduction)
    if reduction == "none":
        raise ValueError(
            '`reduction` must be "mean" or "sum" in dist_loss, got \'none\': the relation of a class belongs to the '
            "whole batch and cannot be divided among the examples"
        )


def _number(x: jax.Array, kept: jax.Array | None, dtype: DTypeLike, axis_name: AxisName | None) -> jax.Array | int:
    """The number of kept examples on all devices, at least one."""
    return max(len(x), 1) * size(axis_name) if kept is None else count(kept, dtype, axis_name)


@functools.cache
def _of_batch(axis_name: AxisName | None) -> Callable[..., jax.Array]:
    return rowwise(functools.partial(_value_and_gradient, axis_name))


# The gradient is written by hand, because the norm of a uniform row has no derivative, but its product with the
# teacher's norm does.
def _value_and_gradient(
    axis_name: AxisName | None,
    x: jax.Array,
    y: jax.Array,
    temperature: Scalar,
    kept: jax.Array | None,
    beta: Scalar,
    gamma: Scalar,
    eps: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """A value whose mean over devices is the loss of the whole batch, and its gradient for this device's rows.

    If student and teacher are close, p - q is computed in a way that keeps its digits.
    """
    x, y = zero_masked(kept, x, y)
    number, devices, used = _number(x, kept, x.dtype, axis_name), size(axis_name), _used(x, y, kept, axis_name)
    classes = jnp.maximum(used.sum(), 1)
    p, q = (_above_mean(z, used / classes, temperature, kept, axis_name) for z in (x, y))
    (row,) = zero_masked(kept, jnp.full_like(x[:, :1], 1) * beta / number)
    relations = functools.partial(_relations, row, gamma * used / classes, number, kept, eps, axis_name)
    far = relations(p, q, None)
    value, gradient = jax.lax.cond(
        all_sum(far[0], axis_name) < 0.1 * devices * (beta + gamma),
        lambda: relations(p, q, zero_masked(kept, softmaxes(x, y, temperature)[2])[0]),
        lambda: far,
    )
    return temperature**2 * value, zero_masked(kept, temperature * pulled_back(gradient, p.p))[0]


def _relations(
    row: jax.Array,
    column: jax.Array,
    number: jax.Array | int,
    kept: jax.Array | None,
    eps: Scalar,
    axis_name: AxisName | None,
    p: _Probabilities,
    q: _Probabilities,
    apart: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of 1 - rho over this device's rows and over all columns, and its gradient with respect to p.

    Args:
        row: the weights of the rows, 0 for masked ones.
        column: the weights of the columns, 0 for unused ones.
        number: the number of kept rows on all devices.
        apart: p - q, if p and q are close.
    """
    devices, difference = size(axis_name), () if apart is None else (apart,)
    of_rows, by_row = _gap((p.in_rows, q.in_rows, *difference), devices * row, eps, 1)
    columns = _centered((p.in_columns, q.in_columns, *difference), kept, number, axis_name)
    of_columns, by_column = _gap(columns, devices * column, eps, 0, axis_name)
    return of_rows + of_columns / devices, by_row + by_column


def _used(x: jax.Array, y: jax.Array, kept: jax.Array | None, axis_name: AxisName | None) -> jax.Array:
    """1 for each class that is above -inf in at least one kept row of student or teacher."""
    (above,) = zero_masked(kept, (jnp.maximum(x, y) > -jnp.inf).astype(x.dtype))
    return jnp.minimum(all_sum(_sum(above, 0), axis_name), 1)


class _Probabilities(NamedTuple):
    """p = softmax(x / T), p minus the mean of its row, and whichever of the two is used for the columns."""

    p: jax.Array
    in_rows: jax.Array
    in_columns: jax.Array


def _above_mean(
    x: jax.Array, mean: jax.Array, temperature: Scalar, kept: jax.Array | None, axis_name: AxisName | None
) -> _Probabilities:
    """The probabilities; in nearly uniform rows, p minus the mean is computed in a way that keeps its digits."""
    largest, (p, peak, log_total) = mean.max(), softmax(x, temperature)
    p, above = zero_masked(kept, p, p - mean)
    uniform = jnp.square(above).sum(-1) < 0.01 * largest
    apart = all_sum((~uniform if kept is None else ~uniform & kept).sum(), axis_name)

    def careful() -> jax.Array:
        ratio = jnp.maximum((x - peak) / temperature, -1e5) - (log_total + jnp.log(largest))
        near = ratio < 1
        above = jnp.where(near, mean * jnp.expm1(jnp.where(near, ratio, 0)), p - mean)
        return zero_masked(kept, above - mean * above.sum(-1, keepdims=True))[0]

    above = jax.lax.cond((uniform if kept is None else uniform & kept).any(), careful, lambda: above)
    return _Probabilities(p, above, jnp.where(apart == 0, above, p))


def _centered(
    arrays: tuple[jax.Array, ...], kept: jax.Array | None, number: jax.Array | int, axis_name: AxisName | None
) -> tuple[jax.Array, ...]:
    """The array minus the mean of each column over kept rows, twice, so that a column of equal entries is exactly 0."""
    for _ in range(2):
        means = all_sum(jnp.stack([_sum(x, 0) for x in arrays]), axis_name) / number
        arrays = zero_masked(kept, *(x - mean for x, mean in zip(arrays, means, strict=True)))
    return arrays


def _gap(
    arrays: tuple[jax.Array, ...], weight: jax.Array, eps: Scalar, axis: int, axis_name: AxisName | None = None
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of 1 - rho over rows or columns, and its gradient with respect to x.

    The first two arrays are x and y, centred. 1 - rho is (|x| |y| |u|^2 / 2 + eps) / (|x| |y| + eps), where u is the
    difference of the two unit vectors, and the unit vector of 0 is 0. Its gradient is (u - (1 - rho) x / |x|) |y| /
    (|x| |y| + eps). If there is a third array, x - y, u is computed from it, so that u keeps its digits if x and y are
    close; otherwise |x| |y| |u|^2 / 2 is computed as |x| |y| - x.y.
    """

    def dots(*pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
        return all_sum(jnp.stack([_sum(a * b, axis) for a, b in pairs]), axis_name)

    x, y, *apart = arrays
    square_x, square_y, along = dots((x, x), (y, y), (apart[0], x + y) if apart else (x, y))
    length_x, length_y = _root(square_x), _root(square_y)
    inverse_x, inverse_y = _inverse(length_x), _inverse(length_y)
    product = length_x * length_y
    pull = weight * length_y / (product + eps)
    if not apart:
        gap = (product - along + eps) / (product + eps)
        gradient = pull * (1 - gap) * inverse_x * x - pull * inverse_y * y
    else:
        longer = along * _inverse(length_x + length_y) * inverse_x * inverse_y  # how much longer x is than y
        u = _inverse(jnp.maximum(length_x, length_y)) * apart[0] - longer * jnp.where(length_x < length_y, x, y)
        (square,) = dots((u, u))
        gap = (product * square / 2 + eps) / (product + eps)
        gradient = pull * u - pull * gap * inverse_x * x
    return (weight * gap).sum(), gradient


def _sum(x: jax.Array, axis: int) -> jax.Array:
    """The sum along an axis; along columns as a matrix product, which XLA on a CPU computes in a tenth of the time."""
    if axis == 0:
        return jnp.matmul(jnp.ones_like(x[:, :1]).T, x, precision=HIGHEST)
    return x.sum(axis, keepdims=True)


def _root(square: jax.Array) -> jax.Array:
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def _inverse(length: jax.Array) -> jax.Array:
    """1 / length; 0 where the length is 0."""
    return jnp.where(length == 0, 0, 1 / jnp.where(length == 0, 1, length))
