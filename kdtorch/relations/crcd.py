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

from kdtorch._collectives import all_gather_constant
from kdtorch._numerics import BLOCK, custom_op, unit, unit_pull, with_gradients
from kdtorch._reduce import count
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked
from kdtorch.relations._memory import Remembered, at_least_one, contrasted, joined, one_side, promoted, unit_rows


class CRCDState(NamedTuple):
    """The memories: embeddings of student and teacher, one for every sample of the data set.

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
    """The state in the buffers of a module. Its memories are changed in place, because only a few rows change."""


def crcd_init(generator: torch.Generator | None, num_data: int, dim: int) -> CRCDState:
    """Memories with uniformly distributed entries and rows of unit length, and normalisers that are not yet set.

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
    at_least_one(num_data=num_data, dim=dim)
    device = None if generator is None else generator.device
    student, teacher = (
        unit(2 * torch.rand(num_data, dim, generator=generator, device=device, dtype=torch.float32) - 1)
        for _ in range(2)
    )
    return CRCDState(student, teacher, student.new_zeros(()), teacher.new_zeros(()))


def crcd_negatives(generator: torch.Generator | None, batch: int, num_negatives: int, num_data: int) -> Tensor:
    """Positions in the data set, drawn uniformly with replacement.

    Args:
        generator: a `torch.Generator`, or None for PyTorch's global one.
        batch: the number of rows.
        num_negatives: the number of negatives for each row.
        num_data: the number of samples in the data set.

    Returns:
        Integers in `0 .. num_data - 1`, `[batch, num_negatives]`.

    Raises:
        ValueError: `num_negatives` or `num_data` below 1.

    >>> from kdtorch import crcd_negatives
    >>> tuple(crcd_negatives(None, 4, 10, 50).shape)
    (4, 10)
    """
    at_least_one(num_negatives=num_negatives, num_data=num_data)
    source: dict[str, Any] = {} if generator is None else {"generator": generator, "device": generator.device}
    return torch.randint(num_data, (batch, num_negatives), **source)


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
        index: `[batch]`, the samples' positions in the data set; one outside `0 .. num_data - 1` is an error.
        negatives: `[batch, num_negatives]`, positions in the same range, from `crcd_negatives`.
        state: from `crcd_init` or the previous step; constant.
        temperature: τ > 0; a tensor has a gradient.
        momentum: m in [0, 1]; a constant.
        where: `[batch]`, False for examples that are left out, as examples and as anchors, and are not stored.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the anchors of each example.
        group: the process group that the batch is spread over.
        sharded_memory: whether each device holds its own rows of the two memories, the same number on each, in the
            order of the devices. Only the rows that the batch needs are sent.
        update: False leaves the state unchanged, for every micro-batch of a step except the last.

    Returns:
        The loss and the next state. If two examples have the same index, the later one is stored. A row that would
        become zero keeps its old value, and a batch that is not finite leaves the whole state unchanged.

    Raises:
        ValueError: a temperature that is not positive, a momentum outside [0, 1], no negatives, a state in half
            precision, an unknown reduction.
        IndexError: an index or a negative outside `0 .. num_data - 1`.
        TypeError: a shape or dtype that does not fit.

    Zhu et al., *Complementary Relation Contrastive Distillation*, CVPR 2021, https://arxiv.org/abs/2103.16367. As in
    the released code, Z is set once, from the first batch. That code builds a tensor `[batch, batch, K + 1, dim]`. This
    function computes r·ρ by matrix products, without that tensor; if two rows of the memory are so close that this
    would lose precision, it uses their differences.

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

    def side(
        embedding: Tensor, remembered: Remembered, normalizer: Tensor, temperature: Tensor, num_data: int
    ) -> tuple[Tensor, Tensor]:
        bank, at, places, every_index, valid, kept = remembered
        anchors = all_gather_constant(bank[at[:, 0]], group) if sharded_memory else bank[every_index]
        known = _Known(bank, at, places, anchors, every_index, valid, kept, num_data)
        number = _log_triples(known)
        return one_side(_contrast, _total, embedding, temperature, normalizer, number, known, group)

    held = isinstance(state, HeldCRCDState)
    settings = held, temperature, momentum, where, reduction, group, sharded_memory, update
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
        num_data: the number of samples in the data set.
    """

    bank: Tensor
    at: Tensor
    places: Tensor
    anchors: Tensor
    anchor_places: Tensor
    valid: Tensor
    kept: Tensor
    num_data: int


_KNOWN = "Tensor bank, Tensor at, Tensor places, Tensor anchors, Tensor anchor_places, Tensor valid, Tensor kept, SymInt num_data"


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
    places: Tensor,
    anchors: Tensor,
    anchor_places: Tensor,
    valid: Tensor,
    kept: Tensor,
    num_data: int,
) -> Tensor:
    """The result of `_sum_over` for this rank's examples if the normaliser is unset, otherwise 0."""
    known = _Known(bank, at, places, anchors, anchor_places, valid, kept, num_data)
    if not unset:
        return temperature.new_zeros(2)
    return _sum_over(_blocks(known, unit_rows(embedding, known)), known, temperature)


# An operator whose gradients are written by hand, so that no array is larger than a block of triples. Only the forward
# pass needs the memories, which are changed before the backward pass, and the relations to them.
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
    places: Tensor,
    anchors: Tensor,
    anchor_places: Tensor,
    valid: Tensor,
    kept: Tensor,
    num_data: int,
    of_embedding: bool,
    of_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The value of each example (a mean over anchors), its gradients, and the result of `_sum_over` for all examples.

    The argument `total` is that of all ranks. On a single rank it is None, and is computed from the same relations as
    the values. It is not needed if the normaliser is set.
    """
    known = _Known(bank, at, places, anchors, anchor_places, valid, kept, num_data)
    v, unset = unit_rows(embedding, known), bool(normalizer == 0)
    blocks = _blocks(known, v, remembered=unset and total is None)
    if total is None:
        total = _sum_over(blocks, known, temperature) if unset else temperature.new_zeros(2)
    log_z, middle = normalizer.log().to(v.dtype), v.new_zeros(())
    if unset:
        log_z, middle = total[0] - _log_triples(known) + math.log(num_data), total[1]

    number, noise = count(valid, v.dtype), (places.shape[1] - 1) / num_data
    log_shifted, shift = math.log(noise + 1e-7), math.log1p(1e-7 / noise)
    value, cooling, gradient = v.new_zeros(len(v)), v.new_zeros(len(v)), torch.zeros_like(v)
    for rows, columns, relations in blocks:
        relation, pull = relations()
        drawn = (relation / temperature).sub_(log_z + log_shifted)
        positive = drawn[..., : int(columns.start == 0)]
        positive.neg_()  # the sign of the positive is opposite to that of negatives
        terms = functional.softplus(drawn, threshold=40).sum(-1) + shift * (drawn.shape[-1] - positive.shape[-1])
        value[rows] += torch.where(valid, terms, 0).sum(-1)
        if not (of_embedding or of_temperature):
            continue
        slope = drawn.sigmoid_()
        positive.neg_()
        if of_temperature:  # an unset normaliser depends on T too
            along = torch.linalg.vecdot(slope, relation) - middle * slope.sum(-1)
            cooling[rows] += torch.where(valid, along, 0).sum(-1)
        if of_embedding:
            gradient[rows] += pull(slope)
    if of_embedding:
        gradient = unit_pull(promoted(embedding, known), gradient / (number * temperature))
    return value / number, gradient, -cooling / (number * temperature**2), total.clone()


def _log_triples(known: _Known) -> Tensor:
    return 2 * count(known.valid, known.bank.dtype).log() + math.log(known.places.shape[1])


_Relations = tuple[Tensor, Callable[[Tensor], Tensor]]
_Block = tuple[slice, slice, Callable[[], _Relations]]


def _sum_over(blocks: list[_Block], known: _Known, temperature: Tensor) -> Tensor:
    """log sum exp(r.rho / T) over the kept triples, and the mean of r.rho under these weights."""
    parts, everything = [temperature.new_tensor([-math.inf, 0.0])], bool(known.kept.all() & known.valid.all())
    for rows, _, relations in blocks:
        relation = relations()[0]
        if not everything:
            relation = relation[known.kept[rows]][:, known.valid]
        if relation.numel():
            peak = relation.amax()
            weight = ((relation - peak) * (math.log2(math.e) / temperature)).exp2_()
            total = weight.sum()
            parts.append(torch.stack([peak / temperature + total.log(), (weight * relation).sum() / total]))
    return joined(torch.stack(parts))


def _blocks(known: _Known, embedding: Tensor, remembered: bool = False) -> list[_Block]:
    """Blocks of examples and places, each with a function that computes its relations.

    A block is so large that a CPU's caches hold an array of its relations with all anchors. With `remembered`,
    relations are computed once and stored, as long as they take no more memory than the next state.
    """
    size = (2 if known.bank.device.type == "cpu" else 64) * BLOCK // max(len(known.anchors), 1)
    examples, places = known.places.shape
    wide = max(min(size, places), 1)
    high = max(size // wide, 1)
    room = max(2 * known.bank.numel(), 4 * BLOCK) if remembered else 0
    blocks: list[_Block] = []
    for i, k in itertools.product(range(0, examples, high), range(0, places, wide)):
        rows, columns = slice(i, i + high), slice(k, k + wide)
        room -= high * wide * (2 * len(known.anchors) + embedding.shape[-1])
        relations = functools.partial(_relations, known, embedding, rows, columns)
        blocks.append((rows, columns, functools.cache(relations) if room >= 0 else relations))
    return blocks


def _relations(known: _Known, embedding: Tensor, rows: slice, columns: slice) -> _Relations:
    """r.rho of some examples and places for every anchor, `[examples, batch, places]`, and a function for its gradient.

    r.rho = (w - a').rho / |w - a'| with a' = a - 1e-6, from matrix products if all w and a are far enough apart.
    """
    anchors, at, places = known.anchors, known.at[rows, columns], known.places[rows, columns]
    rho, rho_length = _unit_and_length((embedding[rows, None] - anchors) + 1e-6)
    middle = anchors.mean(0)  # a part common to all rows would only cost digits
    a, w = anchors - 1e-6 - middle, known.bank[at].sub_(middle)

    same = _same(known.anchor_places, places)
    a_square, w_square = a.square().sum(-1), torch.linalg.vecdot(w, w)
    square, dot = (torch.cat([-2 * a.expand_as(rho), rho], 1) @ w.mT).chunk(2, 1)  # one product reads w once
    square += a_square[:, None]
    square += w_square[:, None]
    square[same] = math.inf
    limit = math.sqrt(torch.finfo(w.dtype).eps) * 30 * torch.maximum(a_square.amax(), w_square.amax())
    clear = not square.amin() < limit

    def differences() -> Iterator[Tensor]:  # for all positions, one anchor after another
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
        """sum_jk slope_jk (r_jk - (r_jk.rho_j) rho_j) / |v - a'_j|, over valid j."""
        near = (known.valid / torch.where(rho_length == 0, 1, rho_length)[..., 0]).to(slope.dtype)
        across = near * torch.linalg.vecdot(slope, relation)
        equal = near.new_zeros(near.shape).index_put_(same[:2], slope[same], accumulate=True) * near
        weight = slope / length
        weight[same] = 0
        if clear:
            pulled = (near[:, None] @ weight @ w)[:, 0] - (near * weight.sum(-1)) @ a
        else:
            weight *= near[..., None]
            parts = zip(weight.unbind(1), differences(), strict=True)
            pulled = torch.stack([(part[:, None] @ x)[:, 0] for part, x in parts]).sum(0)
        return pulled + equal.sum(-1, keepdim=True) * ones - (across[:, None] @ rho)[:, 0]

    return relation, pull


def _same(anchor_places: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    """The few triples of example, anchor and place in which anchor and place are the same sample."""
    number = int(torch.maximum(anchor_places.amax(), places.amax())) + 1
    has_anchor = anchor_places.new_zeros(number, dtype=torch.bool)
    has_anchor[anchor_places] = True
    example, place = has_anchor[places].nonzero(as_tuple=True)
    hit, anchor = (places[example, place][:, None] == anchor_places).nonzero(as_tuple=True)
    return example[hit], anchor, place[hit]


def _unit_and_length(x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.square().sum(-1, keepdim=True).sqrt()
    return x / torch.where(length == 0, 1, length), length
