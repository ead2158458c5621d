"""Contrastive representation distillation."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._numerics import custom_op, unit_pull, with_gradients
from kdtorch._reduce import count
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked
from kdtorch.relations._memory import Remembered, at_least_one, contrasted, one_side, promoted, unit_rows


class CRDState(NamedTuple):
    """The memories: embeddings of student and teacher, one for every sample of the data set.

    Attributes:
        student_memory: `[num_data, dim]`, unit rows, except those that still have their initial values.
        teacher_memory: `[num_data, dim]`, the same.
        student_normalizer: a scalar, 0 until the first step sets it.
        teacher_normalizer: a scalar, 0 until the first step sets it.

    >>> from kdtorch import crd_init
    >>> crd_init(None, 50, 8).student_normalizer.item()
    0.0
    """

    student_memory: Float[Tensor, "num_data dim"]
    teacher_memory: Float[Tensor, "num_data dim"]
    student_normalizer: Float[Tensor, ""]
    teacher_normalizer: Float[Tensor, ""]


class HeldCRDState(CRDState):
    """The state in the buffers of a module. Its memories are changed in place, because only a few rows change."""


def crd_init(generator: torch.Generator | None, num_data: int, dim: int) -> CRDState:
    """Memories with entries drawn uniformly from ±√(3/dim), and normalisers that are not yet set.

    Args:
        generator: a `torch.Generator`, or None for PyTorch's global one.
        num_data: the number of samples in the data set.
        dim: the width of the embeddings.

    Returns:
        The state that `crd_loss` starts from, in float32. As in the released code, its rows have length 1 on average,
        not each.

    Raises:
        ValueError: `num_data` or `dim` below 1.

    >>> from kdtorch import crd_init
    >>> tuple(crd_init(None, 50, 8).student_memory.shape)
    (50, 8)
    """
    at_least_one(num_data=num_data, dim=dim)
    device = None if generator is None else generator.device
    ends = math.sqrt(3 / dim)
    student, teacher = (
        ends * (2 * torch.rand(num_data, dim, generator=generator, device=device, dtype=torch.float32) - 1)
        for _ in range(2)
    )
    return CRDState(student, teacher, student.new_zeros(()), teacher.new_zeros(()))


@checked(learns=("student", "teacher", "temperature"))
def crd_loss(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    index: Integer[Tensor, "batch"],
    negatives: Integer[Tensor, "batch num_negatives"],
    state: CRDState,
    *,
    temperature: Scalar = 0.07,
    momentum: Scalar = 0.5,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    sharded_memory: bool = False,
    update: bool = True,
) -> tuple[Tensor, CRDState]:
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
        index: `[batch]`, the samples' positions in the data set; one outside `0 .. num_data - 1` is an error.
        negatives: `[batch, num_negatives]`, positions in the same range, from `crcd_negatives`, or only from other
            classes; they may include the example's own position.
        state: from `crd_init` or the previous step; constant.
        temperature: τ > 0; a tensor has a gradient.
        momentum: m in [0, 1]; a constant.
        where: `[batch]`, False for examples that are left out and not stored.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.
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
        IndexError: an index or a negative outside `0 .. num_data - 1`.
        TypeError: a shape or dtype that does not fit.

    Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, https://arxiv.org/abs/1910.10699. As in
    the released code, Z is set once, from the first batch, and the sum over the negatives is a sum, not a mean. That
    code builds a tensor `[batch, K + 1, dim]` of memory rows for each side; this function does not.

    >>> import torch
    >>> from kdtorch import crd_init, crd_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> state = crd_init(None, 5, 2)
    >>> index, negatives = torch.tensor([0, 3]), torch.tensor([[1, 2], [4, 2]])
    >>> loss, state = crd_loss(s, t, index, negatives, state)
    >>> bool(loss > 0), bool(state.student_normalizer > 0)
    (True, True)
    """

    def side(
        embedding: Tensor, remembered: Remembered, normalizer: Tensor, temperature: Tensor, num_data: int
    ) -> tuple[Tensor, Tensor]:
        known = _Known(remembered.bank, remembered.at, remembered.valid, remembered.kept, num_data)
        number = _log_pairs(known)
        return one_side(_contrast, _total, embedding, temperature, normalizer, number, known, group)

    held = isinstance(state, HeldCRDState)
    settings = held, temperature, momentum, where, reduction, group, sharded_memory, update
    loss, after = contrasted(side, student, teacher, index, negatives, state, *settings)
    return loss, CRDState(*after) if update else state


class _Known(NamedTuple):
    """What the examples of one side are compared with.

    Attributes:
        bank: `[number, dim]`, remembered rows.
        at: `[batch, K + 1]`, the rows in the bank of the samples for each example.
        valid: `[whole batch]`, False for examples that do not count.
        kept: `[batch]`, the same for this rank's examples.
        num_data: the number of samples in the data set.
    """

    bank: Tensor
    at: Tensor
    valid: Tensor
    kept: Tensor
    num_data: int


_KNOWN = "Tensor bank, Tensor at, Tensor valid, Tensor kept, SymInt num_data"


@custom_op(
    f"(Tensor embedding, Tensor temperature, Tensor unset, {_KNOWN}) -> Tensor",
    lambda embedding, temperature, *_: temperature.new_empty(2),
)
def _total(
    embedding: Tensor,
    temperature: Tensor,
    unset: Tensor,
    bank: Tensor,
    at: Tensor,
    valid: Tensor,
    kept: Tensor,
    num_data: int,
) -> Tensor:
    """The result of `_sum_of` for this rank's examples if the normaliser is unset, otherwise 0."""
    known = _Known(bank, at, valid, kept, num_data)
    if not unset:
        return temperature.new_zeros(2)
    return _sum_of(_scores(unit_rows(embedding, known), known), temperature, known)


# An operator whose gradients are written by hand, so that only the forward pass needs the memories, which are changed
# before the backward pass, and the scores of their rows.
@functools.partial(with_gradients, learns=2)
@custom_op(
    f"(Tensor embedding, Tensor temperature, Tensor normalizer, Tensor? total, {_KNOWN}, bool of_embedding,"
    " bool of_temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda embedding, temperature, *_: (
        (value := temperature.new_empty(embedding.shape[0])),
        temperature.new_empty(embedding.shape),
        torch.empty_like(value),
        temperature.new_empty(2),
    ),
)
def _contrast(
    embedding: Tensor,
    temperature: Tensor,
    normalizer: Tensor,
    total: Tensor | None,
    bank: Tensor,
    at: Tensor,
    valid: Tensor,
    kept: Tensor,
    num_data: int,
    of_embedding: bool,
    of_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The value of each example, its gradients, and the result of `_sum_of` for all examples.

    The argument `total` is that of all ranks. On a single rank it is None, and is computed from the same scores as the
    values. It is not needed if the normaliser is set.
    """
    known = _Known(bank, at, valid, kept, num_data)
    v, unset = unit_rows(embedding, known), bool(normalizer == 0)
    scores = _scores(v, known)
    if total is None:
        total = _sum_of(scores, temperature, known) if unset else temperature.new_zeros(2)
    log_z, middle = normalizer.log().to(v.dtype), v.new_zeros(())
    if unset:
        log_z, middle = total[0] - _log_pairs(known) + math.log(num_data), total[1]

    others = at.shape[1] - 1
    noise = others / num_data
    log_shifted, shift = math.log(noise + 1e-7), math.log1p(1e-7 / noise)
    drawn = (scores / temperature).sub_(log_z + log_shifted)
    drawn[:, 0].neg_()  # the sign of the positive is opposite to that of negatives
    value = functional.softplus(drawn, threshold=40).sum(-1) + shift * others
    cooling, gradient = torch.zeros_like(value), torch.zeros_like(v)
    if of_embedding or of_temperature:
        slope = drawn.sigmoid_()
        slope[:, 0].neg_()
        if of_temperature:  # an unset normaliser depends on T too
            cooling = torch.linalg.vecdot(slope, scores) - middle * slope.sum(-1)
        if of_embedding:
            gradient = unit_pull(promoted(embedding, known), _pulled(slope, known) / temperature)
    return value, gradient, -cooling / temperature**2, total.clone()


def _scores(embedding: Tensor, known: _Known) -> Tensor:
    """v.w of every example and each of its samples, `[batch, K + 1]`.

    This is the derivative of a weighted sum of rows, such as `_pulled`, with respect to the weights. PyTorch has an
    operator for it that does not copy the rows.
    """
    examples, places = known.at.shape
    first = torch.arange(0, examples * places, places, device=known.at.device)
    example = torch.arange(examples, device=known.at.device).repeat_interleave(places)
    operator = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return operator(embedding, known.bank, known.at.flatten(), first, example, 0).view(examples, places)


def _pulled(slope: Tensor, known: _Known) -> Tensor:
    """sum_k slope_k w_k, added up in parts of 256, which rounds less."""
    parts = zip(known.at.split(256, 1), slope.split(256, 1), strict=True)
    bag = functools.partial(functional.embedding_bag, weight=known.bank, mode="sum")
    return torch.stack([bag(at.contiguous(), per_sample_weights=weights.contiguous()) for at, weights in parts]).sum(0)


def _sum_of(scores: Tensor, temperature: Tensor, known: _Known) -> Tensor:
    """log sum exp(v.w / T) over the samples of kept examples, and the mean of v.w under these weights."""
    logits = scores[known.kept] / temperature
    log = logits.flatten().logsumexp(0) if logits.numel() else logits.new_full((), -math.inf)
    return torch.stack([log, ((logits - log).exp_() * scores[known.kept]).sum()])


def _log_pairs(known: _Known) -> Tensor:
    return count(known.valid, known.bank.dtype).log() + math.log(known.at.shape[1])
