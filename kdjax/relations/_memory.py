"""Shared by the losses that contrast an example with a memory of others."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from kdjax._collectives import all_gather_constant, fetch, rank, size
from kdjax._numerics import HIGHEST, check_state, fraction, positive, promote, unit, valid_index
from kdjax._reduce import reduce, zero_masked
from kdjax._typing import Array, AxisName, Reduction, Scalar


def at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


class Remembered(NamedTuple):
    """What the examples of student or teacher are compared with.

    Attributes:
        bank: `[number, dim]`, remembered rows.
        at: `[batch, K + 1]`, the rows in the bank of the samples for each example, its own sample first.
        places: `[batch, K + 1]`, their positions in the data set.
        every_index: `[whole batch]`, the positions of the examples of all devices in the data set.
        valid: `[whole batch]`, False for examples that do not count.
        kept: `[batch]`, the same for this device's examples.
    """

    bank: jax.Array
    at: jax.Array
    places: jax.Array
    every_index: jax.Array
    valid: jax.Array
    kept: jax.Array


# Takes the embedding of one side, the remembered rows of the other side, the normaliser, the temperature and the number
# of samples in the data set, and returns the values and the next normaliser of the side.
Side = Callable[[jax.Array, Remembered, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


def contrasted(
    side: Side,
    student: Array,
    teacher: Array,
    index: Array,
    negatives: Array,
    state: Any,
    temperature: Scalar,
    momentum: Scalar,
    where: Array | None,
    reduction: Reduction,
    axis_name: AxisName | None,
    sharded_memory: bool,
    update: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The sum of the losses of both sides, and the fields of the next state: two memories and two normalisers."""
    student, teacher = promote(student, teacher)
    check_state(state)
    temperature = jnp.asarray(positive("temperature", temperature, student), student.dtype)
    momentum = fraction("momentum", momentum, state.student_memory)
    if negatives.shape[1] < 1:
        raise ValueError(f"`negatives` must hold at least 1 negative per example, got shape {list(negatives.shape)}")
    student, teacher, index, negatives = zero_masked(where, student, teacher, index, negatives)
    rows = len(state.student_memory)
    num_data = rows * size(axis_name) if sharded_memory else rows
    index, factor = valid_index(index, num_data)
    negatives, factors = valid_index(negatives, num_data)
    valid = jnp.isfinite(factor) if where is None else jnp.isfinite(factor) & where
    factor = (factor * factors.prod(1)).astype(student.dtype)

    old = jax.lax.stop_gradient(type(state)(*map(jnp.asarray, state)))
    student, teacher = unit(student), unit(teacher)
    places = jnp.concatenate([index[:, None], negatives], 1)
    every_index, every_valid = all_gather_constant(index, axis_name), all_gather_constant(valid, axis_name)

    def of(embedding: jax.Array, memory: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
        bank, at = memory.astype(embedding.dtype), places
        if sharded_memory:
            bank = fetch(bank, places.ravel(), axis_name)
            at = jnp.arange(places.size).reshape(places.shape)
        remembered = Remembered(bank, at, places, every_index, every_valid, valid)
        return side(embedding, remembered, normalizer, temperature, num_data)

    on_student, student_normalizer = of(student, old.teacher_memory, old.student_normalizer)
    on_teacher, teacher_normalizer = of(teacher, old.student_memory, old.teacher_normalizer)
    loss = reduce(factor * (on_student + on_teacher), where, reduction, axis_name)
    if not update:
        return loss, state
    every_student, every_teacher = all_gather_constant(student, axis_name), all_gather_constant(teacher, axis_name)
    finite = jnp.isfinite(every_student).all() & jnp.isfinite(every_teacher).all()
    last = jnp.where(finite, _last_of_equals(every_index, every_valid), -1)
    here = every_index - (rank(axis_name) * rows if sharded_memory else 0)
    return loss, (
        _remember(old.student_memory, here, last, every_student, momentum),
        _remember(old.teacher_memory, here, last, every_teacher, momentum),
        jnp.where(finite, student_normalizer, old.student_normalizer),
        jnp.where(finite, teacher_normalizer, old.teacher_normalizer),
    )


class Total(NamedTuple):
    """log sum exp(relation / T) over the kept examples, and its derivative: the relation's mean under these weights."""

    log: jax.Array
    mean: jax.Array


def if_unset(unset: jax.Array, embedding: jax.Array, total: Callable[[], Total]) -> Total:
    """The total while the normaliser is unset; after that it is not needed, and 0."""
    nothing = embedding[:0].sum()  # 0, of the same type inside shard_map
    return jax.lax.cond(unset, total, lambda: Total(nothing, nothing))


def one_side(
    contrast: Callable[..., tuple[jax.Array, Total]],
    sum_over: Callable[..., Total],
    num_data: int,
    embedding: jax.Array,
    temperature: jax.Array,
    normalizer: jax.Array,
    log_number: jax.Array,
    known: Any,
    axis_name: AxisName | None,
) -> tuple[jax.Array, jax.Array]:
    """The values of one side, and its normaliser, which, if unset, becomes the mean of the terms that `sum_over` sums.

    `contrast` comes from `with_derivatives`; `log_number` is the logarithm of the number of terms.
    """
    unset, total = normalizer == 0, None
    if axis_name is not None:
        here = if_unset(unset, embedding, lambda: sum_over(*jax.lax.stop_gradient((embedding, temperature)), known))
        total = joined(Total(*(all_gather_constant(x[None], axis_name) for x in here)))
    value, total = contrast(num_data, embedding, temperature, normalizer, total, known)
    fresh = jnp.exp(total.log - log_number).astype(normalizer.dtype) * num_data
    usable = unset & known.valid.any() & jnp.isfinite(fresh)
    return value, jnp.where(usable, fresh, normalizer)


def with_derivatives(with_gradients: Callable[..., tuple]) -> Callable[..., tuple[jax.Array, Total]]:
    """Make a function of values and total from one that also returns the derivatives for embedding and temperature.

    The argument `total` is that of all devices. On a single device it is None, and is computed from the same relations
    as the values. It is not needed if the normaliser is set. The derivatives are written by hand, so that no array of
    all relations is stored, and only the forward pass needs the memories.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def contrast(num_data: int, *inputs: Any) -> tuple[jax.Array, Total]:
        value, *_, total = with_gradients(num_data, *inputs)
        return value, total

    @functools.partial(contrast.defjvp, symbolic_zeros=True)
    def _(num_data: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        value, gradient, of_temperature, total = with_gradients(num_data, *primals)
        moved, warmed, *_ = tangents
        tangent = jnp.zeros_like(value)
        if not isinstance(moved, SymbolicZero):
            tangent += (gradient * moved).sum(-1)
        if not isinstance(warmed, SymbolicZero):
            tangent += of_temperature * warmed
        return (value, total), (tangent, jax.tree.map(jnp.zeros_like, total))

    return contrast


def log_normalizer(normalizer: jax.Array, total: Total, log_number: jax.Array, num_data: int) -> jax.Array:
    """The logarithm of the normaliser, or of the value that an unset one will get."""
    fresh = total.log - log_number + math.log(num_data)
    return jnp.where(normalizer == 0, fresh, jnp.log(normalizer).astype(fresh.dtype))


def noise_contrast(
    relation: jax.Array, log_z: jax.Array, temperature: jax.Array, num_data: int
) -> tuple[jax.Array, jax.Array]:
    """-[log x_0 / (x_0 + c + 1e-7) + sum_k log c / (x_k + c + 1e-7)] per row, and its derivative for relation / T."""
    others = relation.shape[1] - 1
    noise = others / num_data
    log_shifted, shift = math.log(noise + 1e-7), math.log1p(1e-7 / noise)
    sign = jnp.ones(others + 1, relation.dtype).at[0].set(-1)[None]  # the first is the positive
    drawn = sign * (relation / temperature - (log_z + log_shifted))
    return jax.nn.softplus(drawn).sum(1) + shift * others, sign * jax.nn.sigmoid(drawn)


def joined(parts: Total) -> Total:
    """The combined total of several parts."""
    log = jax.nn.logsumexp(parts.log)
    return Total(log, (jnp.exp(parts.log - finite_log(log)) * parts.mean).sum())


def finite_log(log: jax.Array) -> jax.Array:
    return jnp.maximum(log, jnp.finfo(log.dtype).min)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _last_of_equals(index: jax.Array, valid: jax.Array) -> jax.Array:
    """For each example, the last valid example with the same index, or -1 if there is none."""
    order = jnp.arange(len(index), dtype=index.dtype)
    return jnp.where((index[:, None] == index[None]) & valid[None], order[None], -1).max(1, initial=-1)


def _remember(
    memory: jax.Array, index: jax.Array, last: jax.Array, embedding: jax.Array, momentum: Scalar
) -> jax.Array:
    here = (index >= 0) & (index < len(memory))  # the other devices store their own rows
    old = memory[jnp.where(here, index, 0)]
    new = unit(momentum * old + (1 - momentum) * embedding[last].astype(memory.dtype))
    usable = here & (last >= 0) & jnp.isfinite(new).all(1) & (new != 0).any(1)
    return memory.at[jnp.where(usable, index, len(memory))].set(new, mode="drop")
