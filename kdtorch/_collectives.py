"""What the ranks of a process group tell each other; without a group there is one rank."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from kdlosses import checks


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
                f"the ranks of `group` must have batches of the same size, got {len(x)} on rank {rank(group)} and {number} on rank "
                f"{other}; pad the smaller ones, and mask the padding with `where`"
            )


def all_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, the same on all of them; constant to the gradient."""
    x = x.detach()
    if group is not None:
        x = x.clone()
        distributed.all_reduce(x, group=group)
    return x


def all_max(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The largest entry on any rank, the same on all of them; constant to the gradient."""
    x = x.detach()
    if group is not None:
        x = x.clone()
        distributed.all_reduce(x, distributed.ReduceOp.MAX, group=group)
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


def check_dtensors(function: str, leaves: list[tuple[str, Any, checks.Argument]], allowed: str | None) -> bool:
    """Whether there is a DTensor; an error where PyTorch's operators would not carry the loss."""
    tensors = [leaf for leaf in leaves if isinstance(leaf[1], Tensor)]
    sharded = [leaf for leaf in tensors if is_dtensor(leaf[1])]
    if not len(sharded):
        return False
    name, first, _ = sharded[0]
    if allowed is None:
        raise TypeError(
            f"{function}: `{name}` must not be a DTensor; give x.full_tensor(), or, if each rank holds examples of its own, "
            "x.to_local() and group="
        )
    if any(path == "group" and value is not None for path, value, _ in leaves):
        raise TypeError(
            f"{function}: `group` must be None together with the DTensor `{name}`, which holds the whole batch; leave it out, or give "
            "x.to_local() for every DTensor"
        )
    for path, value, argument in tensors:
        if not is_dtensor(value):
            if value.ndim or value.requires_grad:
                raise TypeError(
                    f"{function}: `{path}` must be a DTensor as `{name}` is; give distribute_tensor({path}, mesh, placements), "
                    "or x.full_tensor() for every DTensor, or, if each rank holds examples of its own, x.to_local() and group="
                )
        elif value.device_mesh != first.device_mesh:
            raise TypeError(
                f"{function}: the DTensor `{path}` must be on the mesh of `{name}`; give {path}.redistribute(mesh, placements), "
                "or x.full_tensor() for both"
            )
        elif any(place.is_partial() for place in value.placements):
            raise TypeError(
                f"{function}: the DTensor `{path}` must hold sums, got placements {value.placements}; give "
                f"{path}.redistribute(placements=[Replicate()])"
            )
        elif not _last_axis_fits(value, argument.forms, allowed):
            raise TypeError(
                f"{function}: the last axis of the DTensor `{path}` must {_ROWS[allowed]}, got placements {value.placements} of "
                f"shape {list(map(operator.index, value.shape))}; give {path}.redistribute(placements=[Shard(0)]) or {path}.full_tensor()"
            )
    return True


_ROWS = {"rows": "be whole", "any": "have entries on every rank"}


def _last_axis_fits(x: Any, forms: tuple[checks.Form, ...], allowed: str) -> bool:
    """Of numbers a class or feature, which axis losses reduce."""
    if not x.is_floating_point() or not any(form.dtype == "float" and len(form.axes) > 1 for form in forms):
        return True
    for i, place in enumerate(x.placements):
        if place.is_shard(x.ndim - 1):
            ranks, entries = x.device_mesh.size(i), x.shape[-1]
            if allowed == "rows" or -(-entries // ranks) * (ranks - 1) >= entries:
                return False
    return True


def is_dtensor(x: Tensor) -> bool:
    return type(x).__name__ == "DTensor"  # whose import takes a while
