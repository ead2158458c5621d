"""The work of a rank of a process group in test_ranks.py, which starts the ranks."""

import contextlib
import datetime
import itertools
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from spread import UNEVEN, drawn, own, spread
from torch import distributed, nn

import kdtorch
import kdtorch.nn
from parity.calls import per_example
from parity.cases import KINDS, LOSSES, Loss, each_array


@contextlib.contextmanager
def member(rank: int, ranks: int, folder: str, timeout: float = 60) -> Iterator[None]:
    warnings.simplefilter("error", FutureWarning)
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
    """A loss on a student with a factor of 1 for each feature, or one factor if an example is a number.

    Other inputs that the loss trains are parameters too.
    """

    def __init__(self, loss: Loss, inputs: dict) -> None:
        super().__init__()
        self.loss = loss
        first, rows = inputs[loss.first], KINDS[loss.inputs[loss.first]].axes
        self.scale = nn.ParameterList(torch.ones(x.shape[-1:] if rows else (), dtype=x.dtype) for x in as_list(first))
        self.others = nn.ParameterDict({k: inputs[k].clone() for k in loss.learns[1:] if not spread(loss, k)})

    def forward(self, inputs: dict, **options):
        first = self.loss.first
        scaled = []
        for scale, x in zip(self.scale, as_list(inputs[first]), strict=True):
            number = x.nan_to_num()  # a masked NaN reaches the loss, but not the factor
            scaled.append(scale * number + (x - number))
        given = {**inputs, first: scaled if isinstance(inputs[first], list) else scaled[0], **self.others}
        return per_example(kdtorch, self.loss)(*(given[k] for k in self.loss.inputs), **options)


def as_list(x):
    return x if isinstance(x, list) else [x]


def tensors(inputs: dict) -> dict:
    return each_array(inputs, lambda x: torch.from_numpy(np.array(x)))


def steps_of(loss: Loss, where: np.ndarray | None, group, wrap: Callable[[Student], nn.Module] = lambda x: x) -> list:
    """For each step, on this rank's part of the batch: value, gradients of inputs and of parameters, and state."""
    ranks = group.size() if group else 1
    rank = distributed.get_rank(group) if group else 0
    steps = [tensors(own(loss, inputs, rank, ranks)) for inputs in drawn(loss, where)]
    mask = None if where is None else torch.from_numpy(np.split(where, ranks)[rank])
    state = getattr(kdtorch, loss.inputs[loss.state])(**steps[0].pop(loss.state)) if loss.state else None
    module = wrap(Student(loss, steps[0])) if loss.learns else Student(loss, steps[0])
    results = []
    for inputs in steps:
        learned = [x.requires_grad_() for k in loss.learns if spread(loss, k) for x in as_list(inputs[k])]
        given = {**inputs, **({loss.state: state} if loss.state else {})}
        value = module(given, where=mask, group=group)
        value, state = value if loss.state else (value, None)
        module.zero_grad()
        if loss.learns:
            value.backward()
        results.append(
            {
                "value": value.detach().clone(),
                "inputs": [x.grad for x in learned],
                "parameters": [x.grad.clone() for x in module.parameters() if loss.learns],
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


REMEMBER = [x for x in LOSSES if x.name in ("crcd_loss", "crd_loss")]
WITH_STATE = [loss for loss in LOSSES if loss.state]
# losses of two arrays with one row per example, without other inputs
OF_TWO = [
    x for x in LOSSES if len(x.inputs) == 2 and all(k.endswith(("logits", "features")) for k in x.inputs.values())
]


def said(function: Callable, *arguments, **options) -> str:
    """The text of the error for a mistake."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_step(loss: Loss, group, change: Callable[[dict], None] = lambda inputs: None, **options) -> dict:
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    inputs = tensors(own(loss, drawn(loss)[0], rank, ranks))
    change(inputs)
    state = inputs[loss.state] = getattr(kdtorch, loss.inputs[loss.state])(**inputs[loss.state])
    if options.get("sharded_memory"):
        mine = [x.chunk(ranks)[rank] if x.ndim else x for x in state]
        state = inputs[loss.state] = type(state)(*mine)
    learned = [inputs[k].requires_grad_() for k in loss.learns]
    value, after = loss.of(kdtorch)(*(inputs[k] for k in loss.inputs), group=group, **options)
    value.backward()
    return {
        "value": value.detach(),
        "gradients": [x.grad for x in learned],
        "before": list(state),
        "after": list(after),
        "same": after is state,
    }


def what_goes_wrong(rank: int, ranks: int, folder: str) -> None:
    with member(rank, ranks, folder):
        group = distributed.group.WORLD
        logits = torch.randn(3 - rank, 5)
        results = {f"sizes {loss.name}": said(loss.of(kdtorch), logits, logits, group=group) for loss in OF_TWO}
        results["no member"] = said(kdtorch.kl_loss, logits, logits, group=distributed.new_group([1]))

        def nan(inputs: dict) -> None:
            if rank:
                inputs["teacher"][..., -1, :] = torch.nan

        def skewed(inputs: dict) -> None:
            inputs["negatives"] %= 4

        for loss in WITH_STATE:
            results[f"nan {loss.name}"] = one_step(loss, group, nan)
            results[f"masked {loss.name}"] = one_step(loss, group, where=torch.full((16 // ranks,), not rank))
            results[f"nothing {loss.name}"] = one_step(loss, group, where=torch.zeros(16 // ranks, dtype=torch.bool))
            results[f"update {loss.name}"] = one_step(loss, group)
            results[f"no update {loss.name}"] = one_step(loss, group, update=False)
        for loss, sharded in itertools.product(REMEMBER, (False, True)):
            for name, change in (("uniform", lambda inputs: None), ("skewed", skewed)):
                results[f"{name} {loss.name} {sharded}"] = one_step(loss, group, change, sharded_memory=sharded)
        empty = torch.zeros(0, 5, requires_grad=True)
        for loss in OF_TWO:
            results[f"empty {loss.name}"] = loss.of(kdtorch)(empty, empty.detach(), group=group).detach()

        torch.manual_seed(0)
        module = nn.parallel.DistributedDataParallel(Distiller(), process_group=group)
        x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(rank)).double()
        for update in (False, True):  # two micro-batches of one step
            module(*x, group=group, update=update).backward()
        results["module"] = module.module.state_dict()
        torch.save(results, f"{folder}/{rank}.pt")


class Distiller(nn.Module):
    """A student whose loss has a centre as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.loss = nn.Linear(6, 6).double(), kdtorch.nn.DINOLoss(6).double()

    def forward(self, student, teacher, **options):
        return self.loss(self.student(student), teacher, **options)


def killed(rank: int, ranks: int, folder: str) -> None:
    """The last rank ends before the others wait for it."""
    with contextlib.suppress(RuntimeError), member(rank, ranks, folder, timeout=5):
        x = torch.randn(4, 5)
        kdtorch.difference_kl_loss(x, x, group=distributed.group.WORLD)
        if rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        text = said(kdtorch.difference_kl_loss, x, x, group=distributed.group.WORLD)
        torch.save({"said": text, "seconds": time.monotonic() - start}, f"{folder}/{rank}.pt")
