"""Communication between the ranks of a process group; without a group there is one rank."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from kdlosses import checks


def size(group: ProcessGroup | None, name: str = "group") -> int:
    """The number of ranks."""
    if group is None:
        return 1
    if not distributed.is_initialized():
        raise ValueError(
            f"`{name}` must be a process group of torch.distributed, which is not initialised; call "
            f"torch.distributed.init_process_group first, or leave `{name}` out on a single rank"
        )
    return distributed.get_world_size(group)


def rank(group: ProcessGroup | None) -> int:
    """The position of this rank in the group."""
    return 0 if group is None else distributed.get_rank(group)


def check_batch(x: Tensor, group: ProcessGroup | None) -> None:
    """Raise an error on every rank if the ranks hold different numbers of examples."""
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
    """The sum over ranks, the same on all of them; it has no gradient."""
    x = x.detach()
    if group is not None:
        x = x.clone()
        distributed.all_reduce(x, group=group)
    return x


def all_max(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The largest entry on any rank, the same on all of them; it has no gradient."""
    x = x.detach()
    if group is not None:
        x = x.clone()
        distributed.all_reduce(x, distributed.ReduceOp.MAX, group=group)
    return x


def class_range(
    x: Tensor, classes: int, class_group: ProcessGroup | None, group: ProcessGroup | None = None
) -> tuple[int | Tensor, int | Tensor]:
    """The first class of this rank, and the number of classes on all ranks; `classes` is this rank's number.

    Both are tensors under `torch.compile` with a `class_group`, and otherwise integers. The ranks must have the same
    examples, `[*batch, ...]`.
    """
    if class_group is None:
        return 0, classes
    ranks, here = size(class_group, "class_group"), distributed.get_rank(class_group)
    tracing = torch.compiler.is_compiling()
    if group is not None and not tracing:
        members, others = (distributed.get_process_group_ranks(g) for g in (class_group, group))
        if len(set(members) & set(others)) > 1:
            raise ValueError(
                f"`class_group` must be another process group than `group`, got ranks {members} and {others}; the first has the "
                "classes, the second the examples"
            )
    numbers = torch.empty(ranks, 2, dtype=torch.int64, device=x.device)
    examples = math.prod(x.shape[:-1])
    distributed.all_gather(list(numbers.unbind()), numbers.new_tensor([classes, examples]), group=class_group)
    if tracing:
        return numbers[:here, 0].sum(), numbers[:, 0].sum()
    for other, (theirs, rows) in enumerate(numbers.tolist()):
        if not theirs:
            raise ValueError(
                f"every rank of `class_group` must have a class, got none on rank {other}; divide the classes among fewer ranks"
            )
        if rows != examples:
            raise ValueError(
                f"the ranks of `class_group` must hold the same examples, got {examples} on rank {here} and {rows} on rank "
                f"{other}; give each rank its classes of all of them"
            )
    return int(numbers[:here, 0].sum()), int(numbers[:, 0].sum())


def class_sum(x: Tensor, class_group: ProcessGroup | None = None) -> Tensor:
    """The sum over the last axis, which may be spread over ranks, `[*batch, 1]`."""
    total = x.sum(-1, keepdim=True)
    return total if class_group is None else _OverRanks.apply(total, False, class_group)


def class_max(x: Tensor, class_group: ProcessGroup | None = None) -> Tensor:
    """The largest entry of the last axis, which may be spread over ranks, `[*batch, 1]`; it has no gradient."""
    largest = x.detach().amax(-1, keepdim=True)
    return largest if class_group is None else _OverRanks.apply(largest, True, class_group)


def on_first(x: Tensor, class_group: ProcessGroup | None, elsewhere: float) -> Tensor:
    """x on the first rank, another number on the others."""
    return x if rank(class_group) == 0 else torch.full_like(x, elsewhere)


class _OverRanks(torch.autograd.Function):
    """The sum or the maximum over ranks. Only the sum has a derivative, and only in forward mode."""

    @staticmethod
    def forward(x: Tensor, largest: bool, group: ProcessGroup) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x, distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM, group=group)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.largest, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:
        raise NotImplementedError("this loss of kdtorch has no second derivative with `class_group`; kdjax has it")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: None) -> Tensor | None:
        return None if tangent is None or ctx.largest else _OverRanks.apply(tangent, False, ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, largest: bool, group: ProcessGroup) -> tuple[Tensor, int | None]:
        return _OverRanks.apply(x, largest, group), in_dims[0]


def all_gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks, in the order of the ranks. Gradients flow back to the rank that a row came from."""
    return x if group is None else _Gather.apply(x, group)


def all_gather_constant(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks; they have no gradient."""
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
    """The positions of this rank's rows in a gathered tensor."""
    first = rank(group) * rows
    return slice(first, first + rows)


def fetch(rows: Tensor, places: Tensor, group: ProcessGroup | None) -> Tensor:
    """`table[places]` of a table `[n * len(rows), dim]` whose rows are spread over n ranks in equal parts."""
    if group is None:
        return rows[places]
    owner = places.flatten() // len(rows)
    order = owner.argsort(stable=True)
    asked = owner.bincount(minlength=size(group))  # how many rows are requested from each rank
    given = torch.empty_like(asked)
    distributed.all_to_all_single(given, asked, group=group)
    numbers = asked.tolist(), given.tolist()
    wanted = places.new_empty(sum(numbers[1]))
    distributed.all_to_all_single(wanted, (places.flatten() % len(rows))[order], *numbers[::-1], group=group)
    found = rows.new_empty(len(order), rows.shape[1])
    distributed.all_to_all_single(found, rows[wanted], *numbers, group=group)
    return torch.empty_like(found).index_copy_(0, order, found).reshape(*places.shape, -1)


def check_dtensors(function: str, leaves: list[tuple[str, Any, checks.Argument]], allowed: str | None) -> bool:
    """Whether there is a DTensor; an error if PyTorch's operators cannot compute the loss on it."""
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
    for path, held in (("group", "the whole batch"), ("class_group", "all classes")):
        if any(given == path and value is not None for given, value, _ in leaves):
            raise TypeError(
                f"{function}: `{path}` must be None together with the DTensor `{name}`, which holds {held}; leave it out, or give "
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
    """Whether the sharding of the last axis is allowed: that of classes or features, which losses reduce."""
    if not x.is_floating_point() or not any(form.dtype == "float" and len(form.axes) > 1 for form in forms):
        return True
    for i, place in enumerate(x.placements):
        if place.is_shard(x.ndim - 1):
            ranks, entries = x.device_mesh.size(i), x.shape[-1]
            if allowed == "rows" or -(-entries // ranks) * (ranks - 1) >= entries:
                return False
    return True


def is_dtensor(x: Tensor) -> bool:
    return type(x).__name__ == "DTensor"  # by name, because importing the class takes a while
