"""Complementary relation contrastive distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax._numerics import HIGHEST, fraction, positive, rowwise, unit, valid_index, widen
from kdjax._reduce import count, keep, reduce
from kdjax._typing import Array, Bool, Float, Integer, Reduction, Scalar, checked


class CRCDState(NamedTuple):
    """One remembered embedding for every sample of the data set, of student and teacher.

    Attributes:
        student_memory: `[num_data, dim]`, unit rows.
        teacher_memory: `[num_data, dim]`, unit rows.
        student_normalizer: a scalar, 0 until the first step sets it.
        teacher_normalizer: a scalar, 0 until the first step sets it.
    """

    student_memory: Float[Array, "num_data dim"]
    teacher_memory: Float[Array, "num_data dim"]
    student_normalizer: Float[Array, ""]
    teacher_normalizer: Float[Array, ""]


def crcd_init(key: jax.Array, num_data: int, dim: int) -> CRCDState:
    """Memories of uniformly distributed entries, normalised to unit rows; normalisers unset.

    Args:
        key: of `jax.random`.
        num_data: the number of samples in the data set.
        dim: the width of the embeddings.

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
    """Places in the data set, uniform and with replacement, `[batch, num_negatives]`.

    Args:
        key: of `jax.random`.
        batch: the number of rows.
        num_negatives: the number of negatives of each.
        num_data: the number of samples in the data set.

    Raises:
        ValueError: a number below 1.

    >>> import jax
    >>> from kdjax import crcd_negatives
    >>> crcd_negatives(jax.random.key(0), 4, 10, 50).shape
    (4, 10)
    """
    _at_least_one(batch=batch, num_negatives=num_negatives, num_data=num_data)
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
) -> tuple[jax.Array, CRCDState]:
    r"""Complementary relation contrastive distillation: relations to anchors, contrasted with remembered ones.

    For the student's side, with v the unit student embedding, anchors a_j = teacher_memory[index_j] (those of the
    whole batch) and w_ik = teacher_memory[(index_i, negatives_i)_k],

    $$\rho_{ij}=\mathrm{unit}(v_i-a_j+10^{-6}),\quad r_{ijk}=\mathrm{unit}(w_{ik}-a_j+10^{-6}),\quad
    x_{ijk}=\frac{e^{r_{ijk}\cdot\rho_{ij}/\tau}}{Z}$$

    $$-\frac1B\sum_j\left[\log\frac{x_{ij0}}{x_{ij0}+c+10^{-7}}+\sum_{k\ge1}\log\frac{c}{x_{ijk}+c+10^{-7}}\right],
    \qquad c=K/\mathrm{num\_data}$$

    for sample i; the teacher's side is the same with its embedding and student_memory, and the loss is their sum. An
    unset Z becomes mean(exp)·num_data. Afterwards memory[index] ← unit(m·memory[index] + (1−m)·embedding).

    Args:
        student: `[batch, dim]`, normalised here.
        teacher: `[batch, dim]`, normalised here. Its gradient flows, because it comes from a learned head; stop it at
            the teacher's features.
        index: `[batch]`, the samples' places in the data set; one out of range gives NaN for that example.
        negatives: `[batch, num_negatives]`, places too, from `crcd_negatives`; the same holds.
        state: from `crcd_init` or the step before; constant to the gradient.
        temperature: τ > 0.
        momentum: m in [0, 1].
        where: `[batch]`, False for examples that count for nothing, neither as example nor as anchor, and are not
            remembered.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"` for `[batch]`, the mean over anchors of each.

    Returns:
        The loss and the next state. Of two rows with the same index the later one is remembered; an embedding that
        would leave no direction to remember (zero, or not finite) leaves the row as it was.

    Raises:
        ValueError: a temperature that is not positive, a momentum outside [0, 1], no negatives, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Zhu et al., *Complementary Relation Contrastive Distillation*, CVPR 2021, https://arxiv.org/abs/2103.16367. As in
    the released code Z is set once, from the first batch. That code builds an array `[batch, batch, K + 1, dim]`; here
    r·ρ comes from products of matrices, a row at a time, and where two remembered rows are so close that this would
    lose its digits, from their differences.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from kdjax import crcd_init, crcd_loss
    >>> s, t = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> state = crcd_init(jax.random.key(0), 5, 2)
    >>> loss, state = crcd_loss(s, t, jnp.array([0, 3]), jnp.array([[1, 2], [4, 2]]), state)
    >>> bool(loss > 0), bool(state.student_normalizer > 0)
    (True, True)
    """
    student, teacher = widen(student, teacher)
    temperature = positive("temperature", temperature, student)
    momentum = fraction("momentum", momentum, state.student_memory)
    if negatives.shape[1] < 1:
        raise ValueError(f"`negatives` must hold at least 1 negative an example, got shape {list(negatives.shape)}")
    student, teacher, index, negatives = keep(where, student, teacher, index, negatives)
    num_data = state.student_memory.shape[0]
    index, factor = valid_index(index, num_data)
    negatives, factors = valid_index(negatives, num_data)
    valid = jnp.isfinite(factor) if where is None else jnp.isfinite(factor) & where
    factor = (factor * factors.prod(1)).astype(student.dtype)

    state = jax.lax.stop_gradient(state)
    student, teacher = unit(student), unit(teacher)
    places = jnp.concatenate([index[:, None], negatives], 1)
    on_student, student_normalizer = _side(
        student, places, valid, state.teacher_memory, state.student_normalizer, temperature
    )
    on_teacher, teacher_normalizer = _side(
        teacher, places, valid, state.student_memory, state.teacher_normalizer, temperature
    )
    last = _last_of_equals(index, valid)
    state = CRCDState(
        _remember(state.student_memory, index, last, student, momentum),
        _remember(state.teacher_memory, index, last, teacher, momentum),
        student_normalizer,
        teacher_normalizer,
    )
    return reduce(factor * (on_student + on_teacher), where, reduction), state


def _side(
    embedding: jax.Array,
    places: jax.Array,
    valid: jax.Array,
    memory: jax.Array,
    normalizer: jax.Array,
    temperature: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """The loss of one side for each example, and its normaliser."""
    bank = memory.astype(embedding.dtype)
    unset = normalizer == 0
    log_mean = jax.lax.cond(
        unset,
        lambda: _log_mean(jax.lax.stop_gradient(embedding), places, valid, bank, temperature),
        lambda: jnp.zeros((), embedding.dtype),
    )
    fresh = jnp.exp(log_mean).astype(normalizer.dtype) * len(memory)
    usable = unset & valid.any() & jnp.isfinite(fresh)
    normalizer = jnp.where(usable, fresh, normalizer)
    log_z = jnp.log(jnp.where(unset, fresh, normalizer)).astype(embedding.dtype)
    return _contrast(embedding, places, valid, bank, log_z, jnp.asarray(temperature, embedding.dtype)), normalizer


def _log_mean(
    embedding: jax.Array, places: jax.Array, valid: jax.Array, bank: jax.Array, temperature: Scalar
) -> jax.Array:
    """log of the mean of exp(r.rho/tau) over the kept triples."""

    def row(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        relation = _relations(*inputs, places[:, 0], bank)[0]
        return jax.nn.logsumexp(jnp.where(valid[:, None], relation / temperature, -jnp.inf))

    rows = jnp.where(valid, jax.lax.map(row, (embedding, places)), -jnp.inf)
    number = count(valid, embedding.dtype)
    return jax.nn.logsumexp(rows) - 2 * jnp.log(number) - jnp.log(places.shape[1])


@rowwise
def _contrast(
    embedding: jax.Array, places: jax.Array, valid: jax.Array, bank: jax.Array, log_z: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The value of each example, the mean over anchors, and its gradient with respect to its embedding."""
    number = count(valid, embedding.dtype)
    noise = (places.shape[1] - 1) / bank.shape[0]
    log_noise, log_shifted = jnp.log(noise), jnp.log(noise + 1e-7)

    def row(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        relation, pull = _relations(*inputs, places[:, 0], bank)
        log_x = relation / temperature - log_z
        positive, negative = log_x[:, :1], log_x[:, 1:]
        terms = -jax.nn.log_sigmoid(positive - log_shifted).sum(1)
        terms -= (jax.nn.log_sigmoid(log_shifted - negative) + (log_noise - log_shifted)).sum(1)
        slope = jnp.concatenate([-jax.nn.sigmoid(log_shifted - positive), jax.nn.sigmoid(negative - log_shifted)], 1)
        slope = jnp.where(valid[:, None], slope, 0) / temperature
        return jnp.where(valid, terms, 0).sum() / number, pull(slope) / number

    return jax.lax.map(row, (embedding, places))


def _relations(
    embedding: jax.Array, places: jax.Array, anchor_places: jax.Array, bank: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """r.rho of one example for every anchor and place, `[batch, K + 1]`, and the function that takes a slope on it back.

    With a' = a - 1e-6: r.rho = (w - a').rho / |w - a'|, from products of matrices where all w and a are well apart.
    """
    anchors, remembered = bank[anchor_places], bank[places]
    rho, rho_length = _unit_and_length((embedding[None] - anchors) + 1e-6)
    middle = anchors.mean(0, keepdims=True)  # what is common to all rows only costs digits
    a, w = anchors - 1e-6 - middle, remembered - middle

    same = anchor_places[:, None] == places[None]
    a_square, w_square = jnp.square(a).sum(1), jnp.square(w).sum(1)
    square = a_square[:, None] + w_square[None] - 2 * _product(a, w.T)
    close = square < jnp.sqrt(jnp.finfo(w.dtype).eps) * 30 * jnp.maximum(a_square.max(), w_square.max())
    clear = ~(close & ~same).any()

    def by_products(weight: jax.Array) -> jax.Array:
        """sum_k weight_jk (w_k - a'_j)"""
        return _product(weight, w) - weight.sum(1, keepdims=True) * a

    def by_differences(weight: jax.Array) -> jax.Array:
        return (weight[:, :, None] * differences()).sum(1)

    def differences() -> jax.Array:  # fused into the sums, never held
        return (remembered[None] - anchors[:, None]) + 1e-6

    def dot_by_differences() -> tuple[jax.Array, jax.Array]:
        return jnp.square(differences()).sum(-1), (differences() * rho[:, None]).sum(-1)

    square, dot = jax.lax.cond(
        clear, lambda: (square, _product(rho, w.T) - (rho * a).sum(1, keepdims=True)), dot_by_differences
    )
    length = jnp.sqrt(jnp.where(same | (square <= 0), 1, square))
    ones = 1 / jnp.sqrt(jnp.asarray(w.shape[1], w.dtype))
    relation = jnp.where(same, rho.sum(1, keepdims=True) * ones, dot / length)

    def pull(slope: jax.Array) -> jax.Array:
        apart = jnp.where(same, 0, slope / length)
        towards = jax.lax.cond(clear, by_products, by_differences, apart)
        towards += jnp.where(same, slope, 0).sum(1, keepdims=True) * ones
        across = towards - (towards * rho).sum(1, keepdims=True) * rho
        return (across / jnp.where(rho_length == 0, 1, rho_length)).sum(0)

    return relation, pull


def _unit_and_length(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = jnp.sqrt(jnp.square(x).sum(1, keepdims=True))
    return x / jnp.where(length == 0, 1, length), length


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=HIGHEST)


def _last_of_equals(index: jax.Array, valid: jax.Array) -> jax.Array:
    """For each example the last valid one with the same index, -1 if there is none."""
    order = jnp.arange(len(index), dtype=index.dtype)
    return jnp.where((index[:, None] == index[None]) & valid[None], order[None], -1).max(1)


def _remember(
    memory: jax.Array, index: jax.Array, last: jax.Array, embedding: jax.Array, momentum: Scalar
) -> jax.Array:
    old = memory[index]
    new = unit(momentum * old + (1 - momentum) * embedding[last].astype(memory.dtype))
    usable = (last >= 0) & jnp.isfinite(new).all(1) & (new != 0).any(1)
    return memory.at[index].set(jnp.where(usable[:, None], new, old))
