"""Contrastive representation distillation."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax._numerics import check_fixed
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


class CRDState(NamedTuple):
    """The memories: embeddings of student and teacher, one for every sample of the data set.

    Attributes:
        student_memory: `[num_data, dim]`, unit rows, except those that still have their initial values.
        teacher_memory: `[num_data, dim]`, the same.
        student_normalizer: a scalar, 0 until the first step sets it.
        teacher_normalizer: a scalar, 0 until the first step sets it.

    >>> import jax
    >>> from kdjax import crd_init
    >>> crd_init(jax.random.key(0), 50, 8).student_normalizer.item()
    0.0
    """

    student_memory: Float[Array, "num_data dim"]
    teacher_memory: Float[Array, "num_data dim"]
    student_normalizer: Float[Array, ""]
    teacher_normalizer: Float[Array, ""]


def crd_init(key: jax.Array, num_data: int, dim: int) -> CRDState:
    """Memories with entries drawn uniformly from ±√(3/dim), and normalisers that are not yet set.

    Args:
        key: of `jax.random`.
        num_data: the number of samples in the data set.
        dim: the width of the embeddings.

    Returns:
        The state that `crd_loss` starts from, in float32. As in the released code, its rows have length 1 on average,
        not each.

    Raises:
        ValueError: `num_data` or `dim` below 1.

    >>> import jax
    >>> from kdjax import crd_init
    >>> crd_init(jax.random.key(0), 50, 8).student_memory.shape
    (50, 8)
    """
    at_least_one(num_data=num_data, dim=dim)
    ends = math.sqrt(3 / dim)
    student, teacher = (jax.random.uniform(k, (num_data, dim), jnp.float32, -ends, ends) for k in jax.random.split(key))
    return CRDState(student, teacher, jnp.zeros((), student.dtype), jnp.zeros((), teacher.dtype))


@checked
def crd_loss(
    student: Float[Array, "batch dim"],
    teacher: Float[Array, "batch dim"],
    index: Integer[Array, "batch"],
    negatives: Integer[Array, "batch num_negatives"],
    state: CRDState,
    *,
    temperature: Scalar = 0.07,
    momentum: Scalar = 0.5,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    sharded_memory: bool = False,
    update: bool = True,
) -> tuple[jax.Array, CRDState]:
    r"""Contrastive representation distillation: an embedding against its teacher's and those of other examples in a memory.

    For the student's side, with v the unit student embedding of an example and w_0 … w_K the rows of teacher_memory at
    its own position and at its negatives,

    $$x_k=\frac{e^{v\cdot w_k/\tau}}{Z},\qquad -\log\left(\frac{x_0}{x_0+c+10^{-7}}\right)
    -\sum_{k\ge1}\log\left(\frac{c}{x_k+c+10^{-7}}\right),\qquad c=K/\mathrm{num\_data}$$

    The teacher's side is the same with its embedding and student_memory, and the loss is the sum of the two. If Z is not
    yet set, it becomes mean(exp)·num_data over the kept examples. Afterwards memory[index] ← unit(m·memory[index] +
    (1−m)·embedding).

    Args:
        student: `[batch, dim]`, normalised here.
        teacher: `[batch, dim]`, normalised here. It has a gradient, because it comes from a head that is trained; stop
            the gradient at the teacher's features.
        index: `[batch]`, the samples' positions in the data set; one outside `0 .. num_data - 1` gives NaN for that
            example.
        negatives: `[batch, num_negatives]`, positions in the same range, from `crcd_negatives`, or only from other
            classes; they may include the example's own position.
        state: from `crd_init` or the previous step; constant.
        temperature: τ > 0; an array has a gradient.
        momentum: m in [0, 1]; a constant.
        where: `[batch]`, False for examples that are left out and not stored.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        sharded_memory: whether each device holds its own rows of the two memories, the same number on each, in the
            order of the devices. Only the rows that the batch needs are sent.
        update: False leaves the state unchanged, for every micro-batch of a step except the last.

    Returns:
        The loss and the next state. If two examples have the same index, the later one is stored. A row that would
        become zero keeps its old value, and a batch that is not finite leaves the whole state unchanged. A normaliser
        that is too large for the dtype stays unset, and is computed again in the next step.

    Raises:
        ValueError: a temperature that is not positive, a momentum outside [0, 1], no negatives, a state in half
            precision, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, https://arxiv.org/abs/1910.10699. As in
    the released code, Z is set once, from the first batch, and the sum over the negatives is a sum, not a mean. That
    code builds an array `[batch, K + 1, dim]` of memory rows for each side; this function does not.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from kdjax import crd_init, crd_loss
    >>> s = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> t = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    >>> state = crd_init(jax.random.key(0), 5, 2)
    >>> index, negatives = jnp.array([0, 3]), jnp.array([[1, 2], [4, 2]])
    >>> loss, state = crd_loss(s, t, index, negatives, state)
    >>> bool(loss > 0), bool(state.student_normalizer > 0)
    (True, True)
    """
    check_fixed("crd_loss", batch=student.shape[0], negatives=negatives.shape[1], memory=state.student_memory.shape[0])

    def side(
        embedding: jax.Array, remembered: Remembered, normalizer: jax.Array, temperature: jax.Array, num_data: int
    ) -> tuple[jax.Array, jax.Array]:
        known = _Known(remembered.bank, remembered.at, remembered.valid, remembered.kept)
        number = _log_pairs(known)
        return one_side(_contrast, _sum_over, num_data, embedding, temperature, normalizer, number, known, axis_name)

    settings = temperature, momentum, where, reduction, axis_name, sharded_memory, update
    loss, after = contrasted(side, student, teacher, index, negatives, state, *settings)
    return loss, CRDState(*after) if update else state


class _Known(NamedTuple):
    """What the examples of one side are compared with.

    Attributes:
        bank: `[number, dim]`, remembered rows.
        at: `[batch, K + 1]`, the rows in the bank of the samples for each example.
        valid: `[whole batch]`, False for examples that do not count.
        kept: `[batch]`, the same for this device's examples.
    """

    bank: jax.Array
    at: jax.Array
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
    """The value of each example, its gradients in differentiable operations, and the total."""
    unset, scores = normalizer == 0, _scores(embedding, known)
    if total is None:
        total = if_unset(unset, embedding, lambda: _sum_of(jax.lax.stop_gradient(scores), temperature, known))
    log_z = log_normalizer(normalizer, total, _log_pairs(known), num_data)
    value, slope = noise_contrast(scores, log_z, temperature, num_data)
    middle = jnp.where(unset, total.mean, 0)  # an unset normaliser depends on T too
    cooling = (slope * (scores - middle)).sum(1)
    return value, _pulled(slope, known) / temperature, -cooling / temperature**2, total


_contrast = with_derivatives(_with_gradients)


def _scores(embedding: jax.Array, known: _Known) -> jax.Array:
    """v.w of every example and each of its samples, `[batch, K + 1]`, computed for one example after another."""
    return jax.lax.map(jax.checkpoint(lambda x: product(known.bank[x[1]], x[0])), (embedding, known.at))


def _pulled(slope: jax.Array, known: _Known) -> jax.Array:
    """sum_k slope_k w_k."""
    return jax.lax.map(jax.checkpoint(lambda x: product(x[0], known.bank[x[1]])), (slope, known.at))


def _sum_over(embedding: jax.Array, temperature: jax.Array, known: _Known) -> Total:
    """The total of this device's examples."""
    return _sum_of(_scores(embedding, known), temperature, known)


def _sum_of(scores: jax.Array, temperature: jax.Array, known: _Known) -> Total:
    logits = jnp.where(known.kept[:, None], scores / temperature, -jnp.inf)
    log = jax.nn.logsumexp(logits, 1)
    mean = (jnp.exp(logits - finite_log(log)[:, None]) * scores).sum(1)
    return joined(Total(log, jnp.where(known.kept, mean, 0)))


def _log_pairs(known: _Known) -> jax.Array:
    return jnp.log(count(known.valid, known.bank.dtype)) + math.log(known.at.shape[1])
