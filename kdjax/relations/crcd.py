"""Complementary relation contrastive distillation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather_constant
from kdjax._numerics import check_fixed, unit
from kdjax._reduce import count
from kdjax._typing import Array, AxisName, Bool, Float, Integer, Reduction, Scalar, checked
from kdjax.relations._memory import (
    Remembered,
    Total,
    at_least_one,
    contrasted,
    finite_log,
    if_unset,
    joined,
    log_normalizer,
    noise_contrast,
    one_side,
    product,
    with_derivatives,
)


class CRCDState(NamedTuple):
    """The memories: embeddings of student and teacher, one for every sample of the data set.

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
    """Memories with uniformly distributed entries and rows of unit length, and normalisers that are not yet set.

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
    at_least_one(num_data=num_data, dim=dim)
    student, teacher = (unit(jax.random.uniform(k, (num_data, dim), jnp.float32, -1, 1)) for k in jax.random.split(key))
    return CRCDState(student, teacher, jnp.zeros((), student.dtype), jnp.zeros((), teacher.dtype))


def crcd_negatives(key: jax.Array, batch: int, num_negatives: int, num_data: int) -> jax.Array:
    """Positions in the data set, drawn uniformly with replacement.

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
    at_least_one(num_negatives=num_negatives, num_data=num_data)
    return jax.random.randint(key, (batch, num_negatives), 0, num_data)


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
    r"""Complementary relation contrastive distillation: relations to anchors, contrasted with relations from a memory.

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
        teacher: `[batch, dim]`, normalised here. It has a gradient, because it comes from a head that is trained; stop
            the gradient at the teacher's features.
        index: `[batch]`, the samples' positions in the data set; one outside `0 .. num_data - 1` gives NaN for that
            example.
        negatives: `[batch, num_negatives]`, positions in the same range, from `crcd_negatives`.
        state: from `crcd_init` or the previous step; constant.
        temperature: τ > 0; an array has a gradient.
        momentum: m in [0, 1]; a constant.
        where: `[batch]`, False for examples that are left out, as examples and as anchors, and are not stored.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the anchors of each example.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        sharded_memory: whether each device holds its own rows of the two memories, the same number on each, in the
            order of the devices. Only the rows that the batch needs are sent.
        update: False leaves the state unchanged, for every micro-batch of a step except the last.

    Returns:
        The loss and the next state. If two examples have the same index, the later one is stored. A row that would
        become zero keeps its old value, and a batch that is not finite leaves the whole state unchanged.

    Raises:
        ValueError: a temperature that is not positive, a momentum outside [0, 1], no negatives, a state in half
            precision, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Zhu et al., *Complementary Relation Contrastive Distillation*, CVPR 2021, https://arxiv.org/abs/2103.16367. As in
    the released code, Z is set once, from the first batch. That code builds an array `[batch, batch, K + 1, dim]`. This
    function computes r·ρ by matrix products, without that array; if two rows of the memory are so close that this would
    lose precision, it uses their differences.

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

    def side(
        embedding: jax.Array, remembered: Remembered, normalizer: jax.Array, temperature: jax.Array, num_data: int
    ) -> tuple[jax.Array, jax.Array]:
        bank, at, places, every_index, valid, kept = remembered
        anchors = all_gather_constant(bank[at[:, 0]], axis_name) if sharded_memory else bank[every_index]
        known = _Known(bank, at, places, anchors, every_index, valid, kept)
        number = _log_triples(known)
        return one_side(_contrast, _sum_over, num_data, embedding, temperature, normalizer, number, known, axis_name)

    settings = temperature, momentum, where, reduction, axis_name, sharded_memory, update
    loss, after = contrasted(side, student, teacher, index, negatives, state, *settings)
    return loss, CRCDState(*after) if update else state


class _Known(NamedTuple):
    """What the examples of one side are compared with: remembered samples, as seen from the anchors of the whole batch.

    Attributes:
        bank: `[number, dim]`, remembered rows.
        at: `[batch, K + 1]`, the rows in the bank of the samples for each example.
        places: `[batch, K + 1]`, the positions of these samples in the data set.
        anchors: `[whole batch, dim]`.
        anchor_places: `[whole batch]`, the positions of the anchors in the data set.
        valid: `[whole batch]`, False for anchors that do not count.
        kept: `[batch]`, False for examples that do not count.
    """

    bank: jax.Array
    at: jax.Array
    places: jax.Array
    anchors: jax.Array
    anchor_places: jax.Array
    valid: jax.Array
    kept: jax.Array


def _with_gradients(
    num_data: int,
    embedding: jax.Array,
    temperature: jax.Array,
    normalizer: jax.Array,
    total: Total | None,
    known: _Known,
) -> tuple[jax.Array, jax.Array, jax.Array, Total]:
    """The value of each example (a mean over anchors), its gradients in differentiable operations, and the total."""
    unset, number = normalizer == 0, count(known.valid, embedding.dtype)
    rows, constant = (embedding, known.at, known.places), jax.lax.stop_gradient(embedding)

    def contrasts(total: Total, remembered: _Relations | None = None) -> tuple[jax.Array, jax.Array, jax.Array, Total]:
        log_z = log_normalizer(normalizer, total, _log_triples(known), num_data)

        def contrast(inputs: tuple) -> tuple[jax.Array, ...]:
            row, relations = inputs
            relations = _relations(known, *row) if relations is None else relations
            terms, slope = noise_contrast(relations.relation, log_z, temperature, num_data)
            middle = jnp.where(unset, total.mean, 0)  # an unset normaliser depends on T too
            along = (slope * (relations.relation - middle)).sum(1)
            value, cooling = (jnp.where(known.valid, x, 0).sum() / number for x in (terms, along))
            pulled = _pulled(relations, slope, known, *row) / (number * temperature)
            return value, pulled, -cooling / temperature**2

        value, gradient, of_temperature = jax.lax.map(contrast, (rows, remembered))
        return value, gradient, of_temperature, total

    def remembering() -> tuple[jax.Array, jax.Array, jax.Array, Total]:
        remembered = jax.lax.map(lambda row: _relations(known, *row), rows)
        return contrasts(_sum_over(constant, temperature, known, jax.lax.stop_gradient(remembered)), remembered)

    if total is not None:
        return contrasts(total)
    if 2 * known.places.size * len(known.anchors) > max(2 * known.bank.size, 2**19):
        return contrasts(if_unset(unset, embedding, lambda: _sum_over(constant, temperature, known)))
    # relations that need no more memory than the next state are computed once and stored
    return jax.lax.cond(unset, remembering, lambda: contrasts(Total(jnp.zeros_like(number), jnp.zeros_like(number))))


_contrast = with_derivatives(_with_gradients)


def _log_triples(known: _Known) -> jax.Array:
    return 2 * jnp.log(count(known.valid, known.bank.dtype)) + math.log(known.places.shape[1])


def _sum_over(
    embedding: jax.Array, temperature: jax.Array, known: _Known, remembered: _Relations | None = None
) -> Total:
    """The total of this device's examples."""

    def part(inputs: tuple) -> Total:
        row, relations = inputs
        relation = (_relations(known, *row) if relations is None else relations).relation
        logits = jnp.where(known.valid[:, None], relation / temperature, -jnp.inf)
        log = jax.nn.logsumexp(logits)
        return Total(log, (jnp.exp(logits - finite_log(log)) * relation).sum())

    parts = jax.lax.map(part, ((embedding, known.at, known.places), remembered))
    return joined(Total(jnp.where(known.kept, parts.log, -jnp.inf), jnp.where(known.kept, parts.mean, 0)))


class _Relations(NamedTuple):
    """r.rho of one example for all anchors and places, `[batch, K + 1]`, |w - a'|, and whether they keep digits."""

    relation: jax.Array
    length: jax.Array
    clear: jax.Array


def _relations(known: _Known, embedding: jax.Array, at: jax.Array, places: jax.Array) -> _Relations:
    """r.rho = (w - a').rho / |w - a'| with a' = a - 1e-6, from matrix products if all w and a are far enough apart."""
    a, w, rho, _, same = _seen(known, embedding, at, places)
    a_square, w_square = jnp.square(a).sum(1), jnp.square(w).sum(1)
    square, dot = jnp.split(product(jnp.concatenate([-2 * a, rho]), w.T), 2)  # one product reads w once
    square += a_square[:, None] + w_square[None]
    dot -= (rho * a).sum(1, keepdims=True)
    close = square < jnp.sqrt(jnp.finfo(w.dtype).eps) * 30 * jnp.maximum(
        a_square.max(initial=0), w_square.max(initial=0)
    )
    clear = ~(close & ~same).any()

    def by_differences() -> tuple[jax.Array, jax.Array]:
        return _over_anchors(known, at, lambda x, row: (jnp.square(x).sum(1), (x * row[None]).sum(1)), rho)

    square, dot = jax.lax.cond(clear, lambda: (square, dot), by_differences)
    length = jnp.sqrt(jnp.where(same | (square <= 0), 1, square))
    relation = jnp.where(same, rho.sum(1, keepdims=True) / math.sqrt(w.shape[1]), dot / length)
    return _Relations(relation, length, clear)


def _pulled(
    relations: _Relations, slope: jax.Array, known: _Known, embedding: jax.Array, at: jax.Array, places: jax.Array
) -> jax.Array:
    """sum_jk slope_jk (r_jk - (r_jk.rho_j) rho_j) / |v - a'_j|, over valid j."""
    a, w, rho, rho_length, same = _seen(known, embedding, at, places)
    near = known.valid.astype(slope.dtype) / jnp.where(rho_length == 0, 1, rho_length)[:, 0]
    across = near * (slope * relations.relation).sum(1)
    equal = near * jnp.where(same, slope, 0).sum(1)
    weight = jnp.where(same, 0, slope / relations.length)
    pulled = jax.lax.cond(
        relations.clear,
        lambda: product(product(near, weight), w) - product(near * weight.sum(1), a),
        lambda: _over_anchors(known, at, lambda x, row: (row[:, None] * x).sum(0), near[:, None] * weight).sum(0),
    )
    return pulled + equal.sum() / math.sqrt(w.shape[1]) - product(across, rho)


def _seen(
    known: _Known, embedding: jax.Array, at: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """a' and w minus a part common to all rows, which would only cost digits; rho and its length; and where w is a."""
    rho, rho_length = _unit_and_length((embedding[None] - known.anchors) + 1e-6)
    middle = known.anchors.mean(0, keepdims=True)
    same = known.anchor_places[:, None] == places[None]
    return known.anchors - 1e-6 - middle, known.bank[at] - middle, rho, rho_length, same


def _over_anchors(known: _Known, at: jax.Array, function: Callable, *rows: jax.Array) -> Any:
    """Call a function for each anchor, with the differences of all places from it, and the anchor's part of `rows`."""
    remembered = known.bank[at]
    return jax.lax.map(lambda x: function((remembered - x[0][None]) + 1e-6, *x[1:]), (known.anchors, *rows))


def _unit_and_length(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = jnp.sqrt(jnp.square(x).sum(1, keepdims=True))
    return x / jnp.where(length == 0, 1, length), length
