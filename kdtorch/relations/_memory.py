"""Shared by the losses that contrast an example with a memory of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdtorch._collectives import all_gather_constant, check_batch, fetch, rank, size
from kdtorch._numerics import check_state, fraction, positive, promote, scalar, unit, valid_index
from kdtorch._reduce import reduce, zero_masked
from kdtorch._typing import ProcessGroup, Reduction, Scalar, sizes


def at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


class Remembered(NamedTuple):
    """What the examples of student or teacher are compared with.

    Attributes:
        bank: `[number, dim]`, remembered rows.
        at: `[batch, K + 1]`, the rows of each example's samples in the bank, its own first.
        places: `[batch, K + 1]`, their positions in the data set.
        every_index: `[whole batch]`, where the examples of all ranks stand in the data set.
        valid: `[whole batch]`, False for those that do not count.
        kept: `[batch]`, False for examples that do not count.
    """

    bank: Tensor
    at: Tensor
    places: Tensor
    every_index: Tensor
    valid: Tensor
    kept: Tensor


# Takes the embedding of one side, the remembered rows of the other side, the normaliser, the temperature and the number
# of samples in the data set, and returns the values and the next normaliser of the side.
Side = Callable[[Tensor, Remembered, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def contrasted(
    side: Side,
    student: Tensor,
    teacher: Tensor,
    index: Tensor,
    negatives: Tensor,
    state: Any,
    held: bool,
    temperature: Scalar,
    momentum: Scalar,
    where: Tensor | None,
    reduction: Reduction,
    group: ProcessGroup | None,
    sharded_memory: bool,
    update: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum of the losses of both sides, and the fields of the next state: two memories and two normalisers.

    If a module holds the state (`held`), its memories are changed in place, because only a few of their rows change.
    """
    old = type(state)(*(x.detach().to(student.device) for x in state))
    check_state(state)
    temperature = positive("temperature", temperature, student, teacher)
    temperature = scalar(temperature, student, teacher)
    momentum = fraction("momentum", momentum, old.student_memory)
    if negatives.shape[1] < 1:
        raise ValueError(f"`negatives` must hold at least 1 negative per example, got shape {sizes(negatives)}")
    index, negatives = zero_masked(where, index, negatives)
    rows = len(old.student_memory)
    num_data = rows * size(group) if sharded_memory else rows
    index = valid_index("index", index, num_data)
    negatives = valid_index("negatives", negatives, num_data)
    valid = torch.ones_like(index, dtype=torch.bool) if where is None else where

    check_batch(student, group)
    places = torch.cat([index[:, None], negatives], 1)
    every_index, every_valid = all_gather_constant(index, group), all_gather_constant(valid, group)

    def of(embedding: Tensor, memory: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor]:
        bank, at = memory.to(temperature.dtype), places
        if sharded_memory:
            bank = fetch(bank, places.flatten(), group)
            at = torch.arange(places.numel(), device=places.device).view_as(places)
        remembered = Remembered(bank, at, places, every_index, every_valid, valid)
        return side(embedding, remembered, normalizer, temperature, num_data)

    on_student, student_normalizer = of(student, old.teacher_memory, old.student_normalizer)
    on_teacher, teacher_normalizer = of(teacher, old.student_memory, old.teacher_normalizer)
    loss = reduce(on_student + on_teacher, where, reduction, group)
    if not update:
        return loss, state
    every_student, every_teacher = (
        all_gather_constant(unit(x.detach()), group) for x in zero_masked(where, *promote(student, teacher))
    )
    finite = torch.isfinite(every_student).all() & torch.isfinite(every_teacher).all()
    here, last = every_index, torch.where(finite, _last_of_equals(every_index, every_valid), -1)
    if sharded_memory:  # the other ranks store their own rows
        here = here - rank(group) * rows
        inside = (here >= 0) & (here < rows)
        here, last = here[inside], last[inside]
    new_student = _new_rows(old.student_memory, here, last, every_student, momentum)
    new_teacher = _new_rows(old.teacher_memory, here, last, every_teacher, momentum)
    memories = state if held else old
    return loss, (
        _place(memories.student_memory, here, new_student, in_place=held),
        _place(memories.teacher_memory, here, new_teacher, in_place=held),
        torch.where(finite, student_normalizer, old.student_normalizer),
        torch.where(finite, teacher_normalizer, old.teacher_normalizer),
    )


def one_side(
    contrast: Callable[..., tuple[Tensor, ...]],
    total_of: Callable[..., Tensor],
    embedding: Tensor,
    temperature: Tensor,
    normalizer: Tensor,
    log_number: Tensor,
    known: Any,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The values of one side, and its normaliser, which, if unset, becomes the mean of the terms that `total_of` sums.

    `contrast` and `total_of` are operators; `log_number` is the logarithm of the number of terms.
    """
    unset, total = normalizer == 0, None
    if group is not None:
        total = joined(all_gather_constant(total_of(embedding, temperature.detach(), unset, *known)[None], group))
    value, total = contrast(embedding, temperature, normalizer, total, *known)
    fresh = (total[0] - log_number).exp().to(normalizer.dtype) * known.num_data
    usable = unset & known.valid.any() & torch.isfinite(fresh)
    return value, torch.where(usable, fresh, normalizer)


def promoted(embedding: Tensor, known: Any) -> Tensor:
    return zero_masked(known.kept, embedding.to(known.bank.dtype))[0]


def unit_rows(embedding: Tensor, known: Any) -> Tensor:
    """The embedding's rows, normalised to unit length; 0 for examples that do not count."""
    return unit(promoted(embedding, known))


def joined(parts: Tensor) -> Tensor:
    """The combined total of several parts: log sum exp(relation / T), and the relation's mean under these weights."""
    logs, means = parts.unbind(-1)
    log = logs.logsumexp(0)
    share = (logs - log.clamp(min=torch.finfo(log.dtype).min)).exp()
    return torch.stack([log, (share * means).sum()])


def _last_of_equals(index: Tensor, valid: Tensor) -> Tensor:
    """For each example, the last valid example with the same index, or -1 if there is none."""
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
