"""Complementary relation contrastive distillation."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._collectives import all_gather_constant, check_batch, fetch, rank, size
from kdtorch._numerics import BLOCK, check_state, custom_op, fraction, positive, promote, rowwise, unit, valid_index
from kdtorch._reduce import count, reduce, zero_masked
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked, sizes


class CRCDState(NamedTuple):
    """One remembered embedding for every sample of the data set, of student and teacher.

    Attributes:
        student_memory: `[num_data, dim]`, unit rows.
        teacher_memory: `[num_data, dim]`, unit rows.
        student_normalizer: a scalar, 0 until the first step sets it.
        teacher_normalizer: a scalar, 0 until the first step sets it.

    >>> from kdtorch import crcd_init
    >>> crcd_init(None, 50, 8).student_normalizer.item()
    0.0
    """

    student_memory: Float[Tensor, "num_data dim"]
    teacher_memory: Float[Tensor, "num_data dim"]
    student_normalizer: Float[Tensor, ""]
    teacher_normalizer: Float[Tensor, ""]


class HeldCRCDState(CRCDState):
    """The buffers of a module, whose memories `crcd_loss` writes in place: a copy of all rows would be made for a few."""


def crcd_init(generator: torch.Generator | None, num_data: int, dim: int) -> CRCDState:
    """Memories of uniformly distributed entries, normalised to unit rows; normalisers unset.

    Args:
        generator: a `torch.Generator`, or None for PyTorch's global one.
        num_data: the number of samples in the data set.
        dim: the width of the embeddings.

    Returns:
        The state that `crcd_loss` starts from, in float32.

    Raises:
        ValueError: `num_data` or `dim` below 1.

    >>> from kdtorch import crcd_init
    >>> tuple(crcd_init(None, 50, 8).student_memory.shape)
    (50, 8)
    """
    _at_least_one(num_data=num_data, dim=dim)
    device = None if generator is None else generator.device
    student, teacher = (
        unit(2 * torch.rand(num_data, dim, generator=generator, device=device, dtype=torch.float32) - 1)
        for _ in range(2)
    )
    return CRCDState(student, teacher, student.new_zeros(()), teacher.new_zeros(()))


def crcd_negatives(generator: torch.Generator | None, batch: int, num_negatives: int, num_data: int) -> Tensor:
    """Places in the data set, uniform and with replacement, `[batch, num_negatives]`.

    Args:
        generator: a `torch.Generator`, or None for PyTorch's global one.
        batch: the number of rows.
        num_negatives: the number of negatives of each.
        num_data: the number of samples in the data set.

    Returns:
        Integers in `0 .. num_data - 1`.

    Raises:
        ValueError: `num_negatives` or `num_data` below 1.

    >>> from kdtorch import crcd_negatives
    >>> tuple(crcd_negatives(None, 4, 10, 50).shape)
    (4, 10)
    """
    _at_least_one(num_negatives=num_negatives, num_data=num_data)
    source: dict[str, Any] = {} if generator is None else {"generator": generator, "device": generator.device}
    return torch.randint(num_data, (batch, num_negatives), **source)


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


@checked(learns=("student", "teacher", "temperature"))
def crcd_loss(
    student: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch dim"],
    index: Integer[Tensor, "batch"],
    negatives: Integer[Tensor, "batch num_negatives"],
    state: CRCDState,
    *,
    temperature: Scalar = 0.05,
    momentum: Scalar = 0.5,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    sharded_memory: bool = False,
    update: bool = True,
) -> tuple[Tensor, CRCDState]:
    r"""Complementary relation contrastive distillation: relations to anchors, contrasted with remembered ones.

    For the student's side, with v the unit student embedding, anchors a_j = teacher_memory[index_j] (those of the
    whole batch) and w_ik = teacher_memory[(index_i, negatives_i)_k],

    $$\rho_{ij}=\mathrm{unit}(v_i-a_j+10^{-6}),\quad r_{ijk}=\mathrm{unit}(w_{ik}-a_j+10^{-6}),\quad
    x_{ijk}=\frac{e^{r_{ijk}\cdot\rho_{ij}/\tau}}{Z}$$

    $$-\frac1B\sum_j\left[\log\left(\frac{x_{ij0}}{x_{ij0}+c+10^{-7}}\right)
    +\sum_{k\ge1}\log\left(\frac{c}{x_{ijk}+c+10^{-7}}\right)\right],
    \qquad c=K/\mathrm{num\_data}$$

    for sample i; the teacher's side is the same with its embedding and student_memory, and the loss is their sum. An
    unset Z becomes mean(exp)·num_data. Afterwards memory[index] ← unit(m·memory[index] + (1−m)·embedding).

    Args:
        student: `[batch, dim]`, normalised here.
        teacher: `[batch, dim]`, normalised here. Its gradient flows, because it comes from a learned head; stop it at
            the teacher's features.
        index: `[batch]`, the samples' places in the data set; one out of range is an error.
        negatives: `[batch, num_negatives]`, places too, from `crcd_negatives`; the same holds.
        state: from `crcd_init` or the step before; constant to the gradient.
        temperature: τ > 0.
        momentum: m in [0, 1].
        where: `[batch]`, False for examples that count for nothing, neither as example nor as anchor, and are not
            remembered.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"` for `[batch]`, the mean over anchors of each.
        group: the process group that the batch is spread over; the mean over ranks of what they return, and of their
            gradients, is then that of the whole batch.
        sharded_memory: whether each rank holds its own rows of the two memories, as many as every other, in the order of
            the ranks. The rows that the batch needs then travel, the memories do not.
        update: False leaves the state as it was: for all micro-batches of a step but the last.

    Returns:
        The loss and the next state. Of two rows with the same index the later one is remembered; an embedding that
        would leave no direction to remember leaves the row as it was, a batch that is not finite the whole state.

    Raises:
        ValueError: a temperature that is not positive, a momentum outside [0, 1], no negatives, a state in half
            precision, an unknown reduction.
        IndexError: an index or a negative outside `0 .. num_data - 1`.
        TypeError: a shape or dtype that does not fit.

    Zhu et al., *Complementary Relation Contrastive Distillation*, CVPR 2021, https://arxiv.org/abs/2103.16367. As in
    the released code Z is set once, from the first batch. That code builds an array `[batch, batch, K + 1, dim]`; here
    r·ρ comes from products of matrices, a block at a time, and where two remembered rows are so close that this would
    lose its digits, from their differences.

    >>> import torch
    >>> from kdtorch import crcd_init, crcd_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> state = crcd_init(None, 5, 2)
    >>> index, negatives = torch.tensor([0, 3]), torch.tensor([[1, 2], [4, 2]])
    >>> loss, state = crcd_loss(s, t, index, negatives, state)
    >>> bool(loss > 0), bool(state.student_normalizer > 0)
    (True, True)
    """
    student, teacher = promote(student, teacher)
    old = CRCDState(*(x.detach().to(student.device) for x in state))
    check_state(state)
    temperature = positive("temperature", temperature, student)
    momentum = fraction("momentum", momentum, old.student_memory)
    if negatives.shape[1] < 1:
        raise ValueError(f"`negatives` must hold at least 1 negative an example, got shape {sizes(negatives)}")
    student, teacher, index, negatives = zero_masked(where, student, teacher, index, negatives)
    rows = len(old.student_memory)
    num_data = rows * size(group) if sharded_memory else rows
    index = valid_index("index", index, num_data)
    negatives = valid_index("negatives", negatives, num_data)
    valid = torch.ones_like(index, dtype=torch.bool) if where is None else where

    check_batch(student, group)
    student, teacher = unit(student), unit(teacher)
    places = torch.cat([index[:, None], negatives], 1)
    every_index, every_valid = all_gather_constant(index, group), all_gather_constant(valid, group)

    def side(embedding: Tensor, memory: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor]:
        bank, at = memory.to(embedding.dtype), places
        if sharded_memory:
            bank, at = (
                fetch(bank, places.flatten(), group),
                torch.arange(places.numel(), device=places.device).view_as(places),
            )
            anchors = all_gather_constant(bank[at[:, 0]], group)
        else:
            anchors = bank[every_index]
        known = _Known(bank, at, places, anchors, every_index, every_valid)
        return _side(embedding, valid, known, normalizer, temperature, num_data, group)

    on_student, student_normalizer = side(student, old.teacher_memory, old.student_normalizer)
    on_teacher, teacher_normalizer = side(teacher, old.student_memory, old.teacher_normalizer)
    loss = reduce(on_student + on_teacher, where, reduction, group)
    if not update:
        return loss, state
    every_student, every_teacher = all_gather_constant(student, group), all_gather_constant(teacher, group)
    finite = torch.isfinite(every_student).all() & torch.isfinite(every_teacher).all()
    here, last = every_index, torch.where(finite, _last_of_equals(every_index, every_valid), -1)
    if sharded_memory:  # the rows of other ranks are theirs to remember
        here = here - rank(group) * rows
        inside = (here >= 0) & (here < rows)
        here, last = here[inside], last[inside]
    new_student = _new_rows(old.student_memory, here, last, every_student, momentum)
    new_teacher = _new_rows(old.teacher_memory, here, last, every_teacher, momentum)
    memories = state if isinstance(state, HeldCRCDState) else old
    return loss, CRCDState(
        _place(memories.student_memory, here, new_student, in_place=memories is state),
        _place(memories.teacher_memory, here, new_teacher, in_place=memories is state),
        torch.where(finite, student_normalizer, old.student_normalizer),
        torch.where(finite, teacher_normalizer, old.teacher_normalizer),
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

    bank: Tensor
    at: Tensor
    places: Tensor
    anchors: Tensor
    anchor_places: Tensor
    valid: Tensor


_KNOWN = ", ".join(f"Tensor {field}" for field in _Known._fields)


def _side(
    embedding: Tensor,
    valid: Tensor,
    known: _Known,
    normalizer: Tensor,
    temperature: Scalar,
    num_data: int,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The loss of one side for each example, and its normaliser."""
    number = known.places.shape[1]
    if not isinstance(temperature, Tensor):
        temperature = embedding.new_full((), temperature)
    unset = normalizer == 0
    log_sum = _log_sum(embedding.detach(), valid, *known, temperature, unset)
    log_triples = 2 * count(known.valid, embedding.dtype).log() + math.log(number)
    log_mean = all_gather_constant(log_sum[None], group).logsumexp(0) - log_triples
    fresh = log_mean.exp().to(normalizer.dtype) * num_data
    usable = unset & known.valid.any() & torch.isfinite(fresh)
    normalizer = torch.where(usable, fresh, normalizer)
    log_z = torch.where(unset, log_mean + math.log(num_data), normalizer.log().to(embedding.dtype))
    noise = torch.tensor((number - 1) / num_data, dtype=torch.float64, device="cpu")
    return _contrast(embedding, *known, log_z, temperature, noise), normalizer


@custom_op(
    f"(Tensor embedding, Tensor kept, {_KNOWN}, Tensor temperature, Tensor unset) -> Tensor",
    lambda embedding, *_: embedding.new_empty(()),
)
def _log_sum(embedding: Tensor, kept: Tensor, *others: Tensor) -> Tensor:
    """log of the sum of exp(r.rho/tau) over the kept triples of this rank's examples."""
    *fields, temperature, unset = others
    known = _Known(*fields)
    if not unset:
        return embedding.new_zeros(())
    known, embedding = known._replace(at=known.at[kept], places=known.places[kept]), embedding[kept]
    logs = [
        (_relations(known, embedding, *block)[0][:, known.valid] / temperature).flatten().logsumexp(0)
        for block in _blocks(known)
    ]
    return (torch.stack(logs) if logs else embedding.new_full((1,), -math.inf)).logsumexp(0)


@functools.partial(rowwise, opaque=True)
@custom_op(
    f"(Tensor embedding, {_KNOWN}, Tensor log_z, Tensor temperature, Tensor noise) -> (Tensor, Tensor)",
    lambda embedding, *_: (embedding.new_empty(len(embedding)), torch.empty_like(embedding)),
)
def _contrast(embedding: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """The value of each example, the mean over anchors, and its gradient with respect to its embedding."""
    *fields, log_z, temperature, noise = others
    known = _Known(*fields)
    number = count(known.valid, embedding.dtype)
    log_shifted, shift = math.log(float(noise) + 1e-7), math.log1p(1e-7 / float(noise))

    value, gradient = embedding.new_zeros(len(embedding)), torch.zeros_like(embedding)
    for rows, columns in _blocks(known):
        relation, pull = _relations(known, embedding, rows, columns)
        drawn = (relation / temperature).sub_(log_z + log_shifted)
        positive = drawn[..., : int(columns.start == 0)]
        positive.neg_()  # it is pulled where negatives are pushed
        terms = functional.softplus(drawn, threshold=40).sum(-1) + shift * (drawn.shape[-1] - positive.shape[-1])
        value[rows] += torch.where(known.valid, terms, 0).sum(-1) / number
        slope = drawn.sigmoid_()
        positive.neg_()
        gradient[rows] += pull(slope) / (number * temperature)
    return value, gradient


def _blocks(known: _Known) -> Iterator[tuple[slice, slice]]:
    """Of examples and places: as many at once as let a CPU's caches hold an array of theirs with all anchors."""
    size = (2 if known.bank.device.type == "cpu" else 64) * BLOCK // max(len(known.anchors), 1)
    examples, places = known.places.shape
    wide = max(min(size, places), 1)
    high = max(size // wide, 1)
    for i, k in itertools.product(range(0, examples, high), range(0, places, wide)):
        yield slice(i, i + high), slice(k, k + wide)


def _relations(
    known: _Known, embedding: Tensor, rows: slice, columns: slice
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """r.rho of some examples and places for every anchor, `[examples, batch, places]`, and what takes a slope on it back.

    With a' = a - 1e-6: r.rho = (w - a').rho / |w - a'|, from products of matrices where all w and a are well apart.
    """
    anchors, at, places = known.anchors, known.at[rows, columns], known.places[rows, columns]
    rho, rho_length = _unit_and_length((embedding[rows, None] - anchors) + 1e-6)
    middle = anchors.mean(0)  # what is common to all rows only costs digits
    a, w = anchors - 1e-6 - middle, known.bank[at].sub_(middle)

    same = _same(known.anchor_places, places)
    a_square, w_square = a.square().sum(-1), torch.linalg.vecdot(w, w)
    square, dot = (torch.cat([-2 * a.expand_as(rho), rho], 1) @ w.mT).chunk(2, 1)  # one product reads w once
    square += a_square[:, None]
    square += w_square[:, None]
    square[same] = math.inf
    limit = math.sqrt(torch.finfo(w.dtype).eps) * 30 * torch.maximum(a_square.amax(), w_square.amax())
    clear = not square.amin() < limit

    def differences() -> Iterator[Tensor]:  # of all places from one anchor after the other
        remembered = known.bank[at]
        return ((remembered - anchor) + 1e-6 for anchor in anchors)

    if clear:
        dot -= (rho * a).sum(-1, keepdim=True)
    else:
        square = torch.stack([difference.square().sum(-1) for difference in differences()], 1)
        dot = torch.stack([(x @ r[..., None])[..., 0] for x, r in zip(differences(), rho.unbind(1), strict=True)], 1)
        square.masked_fill_(square <= 0, 1)
    square[same] = 1
    length = square.sqrt_()
    ones = 1 / math.sqrt(w.shape[-1])
    relation = dot.div_(length)
    relation[same] = (rho.sum(-1) * ones)[same[:2]]

    def pull(slope: Tensor) -> Tensor:
        """sum_jk slope_jk (r_jk - (r_jk.rho_j) rho_j) / |v - a'_j|, over valid j. Writes into the slope."""
        near = (known.valid / torch.where(rho_length == 0, 1, rho_length)[..., 0]).to(slope.dtype)
        across = near * torch.linalg.vecdot(slope, relation)
        equal = near.new_zeros(near.shape).index_put_(same[:2], slope[same], accumulate=True) * near
        slope[same] = 0
        weight = slope.div_(length)
        if clear:
            pulled = (near[:, None] @ weight @ w)[:, 0] - (near * weight.sum(-1)) @ a
        else:
            weight *= near[..., None]
            parts = zip(weight.unbind(1), differences(), strict=True)
            pulled = torch.stack([(part[:, None] @ x)[:, 0] for part, x in parts]).sum(0)
        return pulled + equal.sum(-1, keepdim=True) * ones - (across[:, None] @ rho)[:, 0]

    return relation, pull


def _same(anchor_places: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    """The few triples of example, anchor and place where the last two are one."""
    known = anchor_places.new_zeros(int(torch.maximum(anchor_places.amax(), places.amax())) + 1, dtype=torch.bool)
    known[anchor_places] = True
    example, place = known[places].nonzero(as_tuple=True)
    hit, anchor = (places[example, place][:, None] == anchor_places).nonzero(as_tuple=True)
    return example[hit], anchor, place[hit]


def _unit_and_length(x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.square().sum(-1, keepdim=True).sqrt()
    return x / torch.where(length == 0, 1, length), length


def _last_of_equals(index: Tensor, valid: Tensor) -> Tensor:
    """For each example the last valid one with the same index, -1 if there is none."""
    order = torch.arange(len(index), device=index.device)
    return torch.where((index[:, None] == index) & valid, order, -1).amax(1) if len(index) else order


def _new_rows(memory: Tensor, index: Tensor, last: Tensor, embedding: Tensor, momentum: Scalar) -> Tensor:
    old = memory[index]
    new = unit(momentum * old + (1 - momentum) * embedding[last].to(memory.dtype))
    usable = (last >= 0) & torch.isfinite(new).all(1) & (new != 0).any(1)
    return torch.where(usable[:, None], new, old)


def _place(memory: Tensor, index: Tensor, rows: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return memory.index_copy(0, index, rows)
    with torch.no_grad():
        return memory.index_put_((index.to(memory.device),), rows.to(memory.device))
