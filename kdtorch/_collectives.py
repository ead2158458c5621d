"""What the ranks of a process group tell each other; without a group there is one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from kdtorch._typing import ProcessGroup


def size(group: ProcessGroup | None) -> int:
    """The number of ranks."""
    if group is None:
        return 1
    if not distributed.is_initialized():
        raise ValueError(
            "`group` must be a process group of torch.distributed, which is not initialised; call "
            "torch.distributed.init_process_group first, or leave `group` out on a single rank"
        )
    return distributed.get_world_size(group)


def rank(group: ProcessGroup | None) -> int:
    """The place of this rank among them."""
    return 0 if group is None else distributed.get_rank(group)


def check_batch(x: Tensor, group: ProcessGroup | None) -> None:
    """An error on every rank where the ranks hold different numbers of examples."""
    ranks = size(group)
    if group is None or torch.compiler.is_compiling():
        return
    numbers = torch.empty(ranks, dtype=torch.int64, device=x.device)
    distributed.all_gather(list(numbers.split(1)), numbers.new_tensor([len(x)]), group=group)
    for other, number in enumerate(numbers.tolist()):
        if number != len(x):
            raise ValueError(
                f"the ranks of `group` must hold batches of one size, got {len(x)} on rank {rank(group)} and {number} on rank "
                f"{other}; fill the smaller ones up and mask what fills them by `where`"
            )


def all_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, the same on all of them; constant to the gradient."""
    x = x.detach()
    if group is not None:
        x = x.clone()
        distributed.all_reduce(x, group=group)
    return x


def all_gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks, in their order. Gradients flow back to the rank that a row is from."""
    return x if group is None else _Gather.apply(x, group)


def all_gather_constant(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks; constant to the gradient."""
    return all_gather(x.detach(), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        every = x.new_empty(size(group), *x.shape)
        distributed.all_gather(list(every.unbind()), x.contiguous(), group=group)
        return every.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        local_rows = gradient.new_empty(ctx.shape)
        distributed.reduce_scatter(
            local_rows, list(gradient.reshape(size(ctx.group), *ctx.shape).unbind()), group=ctx.group
        )
        return local_rows, None


def local_rows(rows: int, group: ProcessGroup | None) -> slice:
    """The places of this rank's rows in what was gathered."""
    first = rank(group) * rows
    return slice(first, first + rows)


def fetch(rows: Tensor, places: Tensor, group: ProcessGroup | None) -> Tensor:
    """`table[places]` of a table `[n * len(rows), dim]`, of which each of n ranks holds its rows."""
    if group is None:
        return rows[places]
    owner = places.flatten() // len(rows)
    order = owner.argsort(stable=True)
    asked = owner.bincount(minlength=size(group))  # how many of each rank
    given = torch.empty_like(asked)
    distributed.all_to_all_single(given, asked, group=group)
    numbers = asked.tolist(), given.tolist()
    wanted = places.new_empty(sum(numbers[1]))
    distributed.all_to_all_single(wanted, (places.flatten() % len(rows))[order], *numbers[::-1], group=group)
    found = rows.new_empty(len(order), rows.shape[1])
    distributed.all_to_all_single(found, rows[wanted], *numbers, group=group)
    return torch.empty_like(found).index_copy_(0, order, found).reshape(*places.shape, -1)
