"""What a rank of a process group does in test_ranks.py, which starts it."""

import contextlib
import datetime
from collections.abc import Callable, Iterator

import numpy as np
import torch
from spread import UNEVEN, drawn, own, spread
from torch import distributed, nn

import kdtorch
import kdtorch.nn
from parity.cases import LOSSES, Loss, each_array


@contextlib.contextmanager
def member(rank: int, ranks: int, folder: str, timeout: float = 60) -> Iterator[None]:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    yield
    distributed.destroy_process_group()


class Student(nn.Module):
    """A loss of the table on a student with one parameter a feature, which is 1; what else the loss learns is its own."""

    def __init__(self, loss: Loss, inputs: dict) -> None:
        super().__init__()
        self.loss = loss
        first = inputs[loss.learns[0]]
        self.scale = nn.ParameterList(torch.ones(x.shape[-1], dtype=x.dtype) for x in as_list(first))
        self.others = nn.ParameterDict({k: inputs[k].clone() for k in loss.learns[1:] if not spread(loss, k)})

    def forward(self, inputs: dict, **options):
        first = self.loss.learns[0]
        scaled = []
        for scale, x in zip(self.scale, as_list(inputs[first]), strict=True):
            number = x.nan_to_num()  # NaN under the mask reaches the loss, not the scale
            scaled.append(scale * number + (x - number))
        given = {**inputs, first: scaled if isinstance(inputs[first], list) else scaled[0], **self.others}
        return getattr(kdtorch, self.loss.name)(*(given[k] for k in self.loss.inputs), **options)


def as_list(x):
    return x if isinstance(x, list) else [x]


def tensors(inputs: dict) -> dict:
    return each_array(inputs, lambda x: torch.from_numpy(np.array(x)))


def steps_of(loss: Loss, where: np.ndarray | None, group, wrap: Callable[[Student], nn.Module] = lambda x: x) -> list:
    """Value, gradients of the inputs and of the parameters, and state, of each step, on this rank's part of the batch."""
    ranks = group.size() if group else 1
    rank = distributed.get_rank(group) if group else 0
    steps = [tensors(own(loss, inputs, rank, ranks)) for inputs in drawn(loss, where)]
    mask = None if where is None else torch.from_numpy(np.split(where, ranks)[rank])
    state = getattr(kdtorch, loss.inputs[loss.state])(**steps[0].pop(loss.state)) if loss.state else None
    module = wrap(Student(loss, steps[0]))
    results = []
    for inputs in steps:
        learned = [x.requires_grad_() for k in loss.learns if spread(loss, k) for x in as_list(inputs[k])]
        given = {**inputs, **({loss.state: state} if loss.state else {})}
        value = module(given, where=mask, group=group)
        value, state = value if loss.state else (value, None)
        module.zero_grad()
        value.backward()
        results.append(
            {
                "value": value.detach().clone(),
                "inputs": [x.grad for x in learned],
                "parameters": [x.grad.clone() for x in module.parameters()],
                "state": list(state or ()),
            }
        )
    return results


def every_loss(rank: int, ranks: int, folder: str) -> None:
    """All rows of the table under DistributedDataParallel, with and without a mask."""
    with member(rank, ranks, folder):
        mesh = distributed.device_mesh.init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
        group = mesh.get_group("data")
        results = {
            (loss.title, where is not None): steps_of(
                loss, where, group, lambda x: nn.parallel.DistributedDataParallel(x, process_group=group)
            )
            for loss in LOSSES
            for where in (None, UNEVEN)
        }
        torch.save(results, f"{folder}/{rank}.pt")
