"""Complementary relation contrastive distillation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather_constant, fetch, rank, size
from kdjax._numerics import HIGHEST, check_fixed, check_state, fraction, positive, promote, unit, valid_index
from kdjax._reduce import count, reduce, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Integer, Reduction, Scalar, checked


class CRCDState(NamedTuple):
    """The remembered embeddings of student and teacher, one for every sample of the data set.

    Attributes:
        student_memory: `[num_data, dim]`, unit rows.
        teacher_memory: `[num_data, dim]`, unit rows.
        student_normalizer: a scalar, 0 until the first step sets it.
        teacher_normalizer: a scalar, 0 until the first step sets it.

    >>> import jax
    >>> from kdjax import crcd_init
    >>> crcd_init(jax.random.key(0), 50, 8).student_normalizer.item()
    0.0
    """

    student_memory: Float[Array, "num_data dim"]
    teacher_memory: Float[Array, "num_data dim"]
    student_normalizer: Float[Array, ""]
    teacher_normalizer: Float[Array, ""]


def crcd_init(key: jax.Array, num_data: int, dim: int) -> CRCDState:
    """Memories of uniformly distributed entries, scaled to unit rows, and normalisers that are not yet set.

    Args:
        key: of `jax.random`.
        num_data: the number of samples in the data set.
        dim: the width of the embeddings.

    Returns:
        The state that `crcd_loss` starts from, in float32.

    Raises:
        ValueError: `num_data` or `dim` below 1.

    >>> import jax
    >>> from kdjax import crcd_init
    >>> crcd_init(jax.random.key(0), 50, 8).student_memory.shape
    (50, 8)
    """
    _at_least_one(num_data=num_data, dim=dim)
    student, teacher = (unit(jax.random.uniform(k, (num_data, dim), jnp.float32, -1, 1)) for k in jax.random.split(key))
    return CRCDState(student, teacher, jnp.zeros((), student.dtype), jnp.zeros((), teacher.dtype))


def crcd_negatives(key: jax.Array, batch: int, num_negatives: int, num_data: int) -> jax.Array:
    """Places in the data set, drawn uniformly and with replacement.

    Args:
        key: of `jax.random`.
        batch: the number of rows.
        num_negatives: the number of negatives for each row.
        num_data: the number of samples in the data set.

    Returns:
        Integers in `0 .. num_data - 1`, `[batch, num_negatives]`.

    Raises:
        ValueError: `num_negatives` or `num_data` below 1.

    >>> import jax
    >>> from kdjax import crcd_negatives
    >>> crcd_negatives(jax.random.key(0), 4, 10, 50).shape
    (4, 10)
    """
    _at_least_one(num_negatives=num_negatives, num_data=num_data)
    return jax.random.randint(key, (batch, num_negatives), 0, num_data)


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


@checked
def crcd_loss(
    student: Float[Array, "batch dim"],
    teacher: Float[Array, "batch dim"],
    index: Integer[Array, "batch"],
    negatives: Integer[Array, "batch num_negatives"],
    state: CRCDState,
    *,
    temperature: Scalar = 0.05,
    momentum: Scalar = 0.5,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    sharded_memory: bool = False,
    update: bool = True,
) -> tuple[jax.Array, CRCDState]:
    r"""Complementary relation contrastive distillation: relations to anchors, contrasted with remembered ones.

    For the student's side, with v the unit student embedding, anchors a_j = teacher_memory[index_j] (those of the whole
    batch), and w_ik = teacher_memory[(index_i, negatives_i)_k],

    $$\rho_{ij}=\mathrm{unit}(v_i-a_j+10^{-6}),\quad r_{ijk}=\mathrm{unit}(w_{ik}-a_j+10^{-6}),\quad
    x_{ijk}=\frac{e^{r_{ijk}\cdot\rho_{ij}/\tau}}{Z}$$

    $$-\frac1B\sum_j\left[\log\left(\frac{x_{ij0}}{x_{ij0}+c+10^{-7}}\right)
    +\sum_{k\ge1}\log\left(\frac{c}{x_{ijk}+c+10^{-7}}\right)\right],
    \qquad c=K/\mathrm{num\_data}$$

    for example i. The teacher's side is the same with its embedding and student_memory, and the loss is the sum of the
    two. If Z is not yet set, it becomes mean(exp)·num_data. Afterwards memory[index] ← unit(m·memory[index] +
    (1−m)·embedding).

    Args:
        student: `[batch, dim]`, normalised here.
        teacher: `[batch, dim]`, normalised here. Its gradient flows, because it comes from a learned head; stop it at
            the teacher's features.
        index: `[batch]`, the samples' places in the data set; one outside `0 .. num_data - 1` gives NaN for that
            example.
        negatives: `[batch, num_negatives]`, places in the same range, from `crcd_negatives`.
        state: from `crcd_init` or the step before; constant to the gradient.
        temperature: τ > 0; an array has a gradient.
        momentum: m in [0, 1]; a constant.
        where: `[batch]`, False for examples that are left out, as examples and as anchors, and are not remembered.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the anchors of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        sharded_memory: whether each device holds its own rows of the two memories, the same number on each, in the
            order of the devices. Only the rows that the batch needs are then sent.
        update: False leaves the state as it was, for every micro-batch of a step but the last.

    Returns:
        The loss and the next state. If two examples have the same index, the later one is remembered. A row that would
        become zero stays as it was, and a batch that is not finite leaves the whole state as it was.

    Raises:
        ValueError: a temperature that is not positive, a momentum outside [0, 1], no negatives, a state in half
            precision, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Zhu et al., *Complementary Relation Contrastive Distillation*, CVPR 2021, https://arxiv.org/abs/2103.16367. As in
    the released code, Z is set once, from the first batch. That code builds an array `[batch, batch, K + 1, dim]`. Here
    r·ρ is computed by matrix products, without that array; where two remembered rows are so close that this would lose
    precision, it is computed from their differences.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from kdjax import crcd_init, crcd_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> t = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> state = crcd_init(jax.random.key(0), 5, 2)
    >>> index, negatives = jnp.array([0, 3]), jnp.array([[1, 2], [4, 2]])
    >>> loss, state = crcd_loss(s, t, index, negatives, state)
    >>> bool(loss > 0), bool(state.student_normalizer > 0)
    (True, True)
    """
    check_fixed("crcd_loss", batch=student.shape[0], negatives=negatives.shape[1], memory=state.student_memory.shape[0])
    student, teacher = promote(student, teacher)
    check_state(state)
    temperature = positive("temperature", temperature, student)
    momentum = fraction("momentum", momentum, state.student_memory)
    if negatives.shape[1] < 1:
        raise ValueError(f"`negatives` must hold at least 1 negative an example, got shape {list(negatives.shape)}")
    student, teacher, index, negatives = zero_masked(where, student, teacher, index, negatives)
    rows = len(state.student_memory)
    num_data = rows * size(axis_name) if sharded_memory else rows
    index, factor = valid_index(index, num_data)
    negatives, factors = valid_index(negatives, num_data)
    valid = jnp.isfinite(factor) if where is None else jnp.isfinite(factor) & where
    factor = (factor * factors.prod(1)).astype(student.dtype)

    old = jax.lax.stop_gradient(CRCDState(*map(jnp.asarray, state)))
    student, teacher = unit(student), unit(teacher)
    places = jnp.concatenate([index[:, None], negatives], 1)
    every_index, every_valid = all_gather_constant(index, axis_name), all_gather_constant(valid, axis_name)

    def side(embedding: jax.Array, memory: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
        bank, at = memory.astype(embedding.dtype), places
        if sharded_memory:
            bank, at = fetch(bank, places.ravel(), axis_name), jnp.arange(places.size).reshape(places.shape)
            anchors = all_gather_constant(bank[at[:, 0]], axis_name)
        else:
            anchors = bank[every_index]
        known = _Known(bank, at, places, anchors, every_index, every_valid)
        return _side(embedding, valid, known, normalizer, temperature, num_data, axis_name)

    on_student, student_normalizer = side(student, old.teacher_memory, old.student_normalizer)
    on_teacher, teacher_normalizer = side(teacher, old.student_memory, old.teacher_normalizer)
    loss = reduce(factor * (on_student + on_teacher), where, reduction, axis_name)
    if not update:
        return loss, state
    every_student, every_teacher = all_gather_constant(student, axis_name), all_gather_constant(teacher, axis_name)
    finite = jnp.isfinite(every_student).all() & jnp.isfinite(every_teacher).all()
    last = jnp.where(finite, _last_of_equals(every_index, every_valid), -1)
    here = every_index - (rank(axis_name) * rows if sharded_memory else 0)
    return loss, CRCDState(
        _remember(old.student_memory, here, last, every_student, momentum),
        _remember(old.teacher_memory, here, last, every_teacher, momentum),
        jnp.where(finite, student_normalizer, old.student_normalizer),
        jnp.where(finite, teacher_normalizer, old.teacher_normalizer),
    )


class _Known(NamedTuple):
    """What the examples of one side are compared with: their own places, seen from the anchors of the whole batch.

    Attributes:
        bank: `[number, dim]`, remembered rows.
        at: `[batch, K + 1]`, where each example's places stand in the bank.
        places: `[batch, K + 1]`, where they stand in the data set.
        anchors: `[whole batch, dim]`.
        anchor_places: `[whole batch]`, where these stand in the data set.
        valid: `[whole batch]`, False for anchors that count for nothing.
    """

    bank: jax.Array
    at: jax.Array
    places: jax.Array
    anchors: jax.Array
    anchor_places: jax.Array
    valid: jax.Array


def _side(
    embedding: jax.Array,
    valid: jax.Array,
    known: _Known,
    normalizer: jax.Array,
    temperature: Scalar,
    num_data: int,
    axis_name: AxisName | None,
) -> tuple[jax.Array, jax.Array]:
    """The loss of one side for each example, and its normaliser."""
    number = known.places.shape[1]
    temperature = jnp.asarray(temperature, embedding.dtype)
    unset = normalizer == 0
    log_sum = jax.lax.cond(
        unset,
        lambda: _log_sum(jax.lax.stop_gradient(embedding), valid, known, temperature),
        lambda: embedding[:0].sum(),  # 0, of the same type inside shard_map
    )
    log_triples = 2 * jnp.log(count(known.valid, embedding.dtype)) + math.log(number)
    log_mean = jax.nn.logsumexp(all_gather_constant(log_sum[None], axis_name)) - log_triples
    fresh = jnp.exp(log_mean).astype(normalizer.dtype) * num_data
    usable = unset & known.valid.any() & jnp.isfinite(fresh)
    normalizer = jnp.where(usable, fresh, normalizer)
    log_z = jnp.where(unset, log_mean + math.log(num_data), jnp.log(normalizer).astype(embedding.dtype))
    contrast = rowwise(functools.partial(_contrast, (number - 1) / num_data))
    return contrast(embedding, known, log_z, temperature), normalizer


def _log_sum(embedding: jax.Array, valid: jax.Array, known: _Known, temperature: jax.Array) -> jax.Array:
    """log of the sum of exp(r.rho/tau) over the kept triples of this device's examples."""

    def row(inputs: tuple[jax.Array, ...]) -> jax.Array:
        relation = _relations(known, *inputs)[0]
        return jax.nn.logsumexp(jnp.where(known.valid[:, None], relation / temperature, -jnp.inf))

    rows = jax.lax.map(row, (embedding, known.at, known.places))
    return jax.nn.logsumexp(jnp.where(valid, rows, -jnp.inf))


def _contrast(
    noise: float, embedding: jax.Array, known: _Known, log_z: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The value of each example, the mean over anchors, and its gradient with respect to its embedding."""
    number = count(known.valid, embedding.dtype)
    log_shifted, shift = math.log(noise + 1e-7), math.log1p(1e-7 / noise)

    def row(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        relation, pull = _relations(known, *inputs)
        sign = jnp.ones(relation.shape[1], relation.dtype).at[0].set(-1)[None]  # the first is pulled, the others pushed
        drawn = sign * (relation / temperature - (log_z + log_shifted))
        terms = jax.nn.softplus(drawn).sum(1) + shift * (relation.shape[1] - 1)
        pulled = pull(sign * jax.nn.sigmoid(drawn))
        return jnp.where(known.valid, terms, 0).sum() / number, pulled / (number * temperature)

    return jax.lax.map(row, (embedding, known.at, known.places))


def _relations(
    known: _Known, embedding: jax.Array, at: jax.Array, places: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """r.rho of one example for every anchor and place, `[batch, K + 1]`, and the function that takes a slope on it back.

    With a' = a - 1e-6: r.rho = (w - a').rho / |w - a'|, from products of matrices where all w and a are well apart.
    """
    anchors, remembered = known.anchors, known.bank[at]
    rho, rho_length = _unit_and_length((embedding[None] - anchors) + 1e-6)
    middle = anchors.mean(0, keepdims=True)  # what is common to all rows only costs digits
    a, w = anchors - 1e-6 - middle, remembered - middle

    same = known.anchor_places[:, None] == places[None]
    a_square, w_square = jnp.square(a).sum(1), jnp.square(w).sum(1)
    square, dot = jnp.split(_product(jnp.concatenate([-2 * a, rho]), w.T), 2)  # one product reads w once
    square += a_square[:, None] + w_square[None]
    dot -= (rho * a).sum(1, keepdims=True)
    close = square < jnp.sqrt(jnp.finfo(w.dtype).eps) * 30 * jnp.maximum(
        a_square.max(initial=0), w_square.max(initial=0)
    )
    clear = ~(close & ~same).any()

    def over_anchors(function: Callable, *rows: jax.Array) -> Any:
        """Of the differences of all places from one anchor after the other, and the anchor's rows."""
        return jax.lax.map(lambda x: function((remembered - x[0][None]) + 1e-6, *x[1:]), (anchors, *rows))

    def by_differences() -> tuple[jax.Array, jax.Array]:
        return over_anchors(lambda x, row: (jnp.square(x).sum(1), (x * row[None]).sum(1)), rho)

    square, dot = jax.lax.cond(clear, lambda: (square, dot), by_differences)
    length = jnp.sqrt(jnp.where(same | (square <= 0), 1, square))
    ones = 1 / jnp.sqrt(jnp.asarray(w.shape[1], w.dtype))
    relation = jnp.where(same, rho.sum(1, keepdims=True) * ones, dot / length)

    def pull(slope: jax.Array) -> jax.Array:
        """sum_jk slope_jk (r_jk - (r_jk.rho_j) rho_j) / |v - a'_j|, over valid j."""
        near = known.valid.astype(slope.dtype) / jnp.where(rho_length == 0, 1, rho_length)[:, 0]
        across = near * (slope * relation).sum(1)
        equal = near * jnp.where(same, slope, 0).sum(1)
        weight = jnp.where(same, 0, slope / length)
        pulled = jax.lax.cond(
            clear,
            lambda: _product(_product(near, weight), w) - _product(near * weight.sum(1), a),
            lambda: over_anchors(lambda x, row: (row[:, None] * x).sum(0), near[:, None] * weight).sum(0),
        )
        return pulled + equal.sum() * ones - _product(across, rho)

    return relation, pull


def _unit_and_length(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = jnp.sqrt(jnp.square(x).sum(1, keepdims=True))
    return x / jnp.where(length == 0, 1, length), length


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _last_of_equals(index: jax.Array, valid: jax.Array) -> jax.Array:
    """For each example the last valid one with the same index, -1 if there is none."""
    order = jnp.arange(len(index), dtype=index.dtype)
    return jnp.where((index[:, None] == index[None]) & valid[None], order[None], -1).max(1, initial=-1)


def _remember(
    memory: jax.Array, index: jax.Array, last: jax.Array, embedding: jax.Array, momentum: Scalar
) -> jax.Array:
    here = (index >= 0) & (index < len(memory))  # the rows of other devices are theirs to remember
    old = memory[jnp.where(here, index, 0)]
    new = unit(momentum * old + (1 - momentum) * embedding[last].astype(memory.dtype))
    usable = here & (last >= 0) & jnp.isfinite(new).all(1) & (new != 0).any(1)
    return memory.at[jnp.where(usable, index, len(memory))].set(new, mode="drop")
