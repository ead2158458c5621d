"""Shared by the losses over pairs of samples: the rows of all devices, their products and their squared distances."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather, all_gather_constant, local_rows
from kdjax._numerics import HIGHEST, check_fixed, promote
from kdjax._reduce import check_reduction, count, reduce, zero_masked
from kdjax._typing import Array, AxisName, Reduction


class Pairs(NamedTuple):
    """The rows of all devices.

    Attributes:
        student: `[whole batch, student_dim]`; masked rows are 0.
        teacher: `[whole batch, teacher_dim]`, constant; masked rows are 0.
        kept: `[whole batch]`.
        local: takes this device's rows of a gathered array.
    """

    student: Array
    teacher: Array
    kept: Array
    local: Callable[[jax.Array], jax.Array]

    def mean(self, terms: jax.Array) -> jax.Array:
        """The mean over kept partners of terms `[batch, whole batch]`."""
        both = self.local(self.kept)[:, None] & self.kept[None]
        return jnp.where(both, terms, 0).sum(1) / count(self.kept, terms.dtype)


def over_pairs(
    loss: str,
    way: Callable[[Pairs], jax.Array],
    student: Array,
    teacher: Array,
    where: Array | None,
    reduction: Reduction,
    axis_name: AxisName | None,
) -> jax.Array:
    """A loss from `way`, which computes the values of this device's rows from the rows of all devices."""
    check_fixed(loss, batch=student.shape[0])
    check_reduction(reduction)
    student, teacher = zero_masked(where, *promote(student, teacher))
    if not len(student):
        return reduce(student.sum(-1), where, reduction, axis_name)
    local = functools.partial(local_rows, rows=len(student), axis_name=axis_name)
    student, teacher = all_gather(student, axis_name), all_gather_constant(teacher, axis_name)
    kept = jnp.ones(len(student), bool) if where is None else all_gather_constant(where, axis_name)
    return reduce(way(Pairs(student, teacher, kept, local)), where, reduction, axis_name)


def products(x: jax.Array, local: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """x_i · x_j for this device's i and every j."""
    ours = local(x)
    return gram(x) if ours is x else jnp.matmul(ours, x.T, precision=HIGHEST)


@jax.custom_jvp
def gram(x: jax.Array) -> jax.Array:
    """x xᵀ. Its gradient (g + gᵀ) x takes one matrix product; that of a product of two different arrays takes two."""
    return jnp.matmul(x, x.T, precision=HIGHEST)


@gram.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    half = jnp.matmul(tangents[0], primals[0].T, precision=HIGHEST)
    return gram(*primals), half + half.T


class Squares(NamedTuple):
    """Squared distances, scaled by a unit.

    Attributes:
        square: |x_i - x_j|² / unit² for this device's i and every j; 0 if one of the two is masked.
        clear: whether the squares come from a matrix product, because none of them loses its digits there.
        rows: all rows; masked ones are made equal to the first kept row.
        unit: a power of 2 near the largest difference of two entries, or infinity if all rows are equal.
    """

    square: jax.Array
    clear: jax.Array
    rows: jax.Array
    unit: jax.Array

    def differences(self, row: jax.Array) -> jax.Array:
        """(row - x_j) / unit for every j."""
        return (row[None] - self.rows) / self.unit


def squares(x: jax.Array, kept: jax.Array, local: Callable[[jax.Array], jax.Array]) -> Squares:
    """Squared distances of the rows of x; one row at a time from the differences, if a matrix product loses digits."""
    x = x / 2  # so that no difference overflows
    first = jax.lax.stop_gradient(x[jnp.argmax(kept)])
    x = jnp.where(kept[:, None], x, first[None])
    largest = jax.lax.stop_gradient(jnp.abs(x - first[None]).max())
    equal = largest < jnp.finfo(x.dtype).tiny
    largest = jnp.where(equal, 1, largest)
    unit = jnp.where(equal, jnp.inf, largest / jnp.frexp(largest)[0])  # a power of 2, so that ties stay ties
    place = jnp.arange(len(x))
    apart = local(kept)[:, None] & kept[None] & (local(place)[:, None] != place[None])
    z = (x - first[None]) / unit  # a part common to all rows would only cost digits
    length = jnp.square(z).sum(-1)
    square = local(length)[:, None] + length[None] - 2 * products(z, local)
    clear = (~apart | (square * 64 > length.max())).all()

    def by_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.where(row[1], jnp.square((row[0][None] - x) / unit).sum(-1), 0)

    rows: Callable[[], Array] = lambda: jax.lax.map(jax.checkpoint(by_row), (local(x), apart))  # noqa: E731
    return Squares(jax.lax.cond(clear, lambda: jnp.where(apart, square, 0), rows), clear, x, unit)
