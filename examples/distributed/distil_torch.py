"""Distillation over several ranks in PyTorch: DistributedDataParallel or FSDP2 for the student, `group` for the losses.

    python examples/distributed/distil_torch.py    # one process

    torchrun --nproc-per-node 2 examples/distributed/distil_torch.py    # two processes, which print the same losses
    torchrun --nproc-per-node 2 examples/distributed/distil_torch.py --engine fsdp

Under `torchrun`, `init_process_group` needs no arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from _common import SETTING, load_inputs, options_of, tell
from _digits_torch import Batch, Net, dino, projection_and_centers, tensors
from digits import Plan, Setting
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from kdtorch import difference_kl_loss, kl_loss


class Distiller(nn.Module):
    """A student with the parameters and states of its losses."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.student = Net(*setting.student, setting.classes)
        self.dcn = projection_and_centers(setting)
        self.dino = dino(setting)

    def forward(
        self, data: Mapping[str, Any], plan: Plan, group: distributed.ProcessGroup | None, update: bool
    ) -> Tensor:
        """A loss whose mean over ranks is the loss of the whole batch; states change only with `update`."""
        batch = Batch(self.student, data, plan)
        logits, embedding, _ = batch.student
        spread: dict[str, Any] = {"group": group}
        labels, sure = batch.given("labels"), batch.given("sure")
        ours, theirs = self.dcn["projection"](embedding), batch.teacher("embedding")
        first, second = self.student(batch.two_views(data["views"])).logits, batch.two_views(data["teacher"]["views"])
        return (
            kl_loss(logits, batch.teacher("logits"), temperature=4.0, where=sure, **spread)
            + difference_kl_loss(logits, batch.teacher("logits"), temperature=4.0, **spread)
            + self.dcn["loss"](ours, theirs, labels, where=sure, **spread)
            + self.dino(first, second, update=update, **spread)
        )


def data_parallel(model: Distiller, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group())


def sharded(model: Distiller, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model.student, mesh=mesh)
    return fully_shard(model, mesh=mesh)


ENGINES = {"ddp": data_parallel, "fsdp": sharded}


def reduces_gradients(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """A context in which gradients are communicated only for the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


def train(data: Mapping[str, Any], plans: Plan, dtype: str, mesh: DeviceMesh | None, engine: str) -> list[float]:
    """Train; returns the loss of each step, which is the same on every rank."""
    torch.manual_seed(0)
    model: nn.Module = Distiller(SETTING).to(getattr(torch, dtype))
    group, ranks = (mesh.get_group(), mesh.size()) if mesh else (None, 1)
    if mesh:
        model = ENGINES[engine](model, mesh)
    optimiser = torch.optim.SGD(model.parameters(), SETTING.student_rate, momentum=0.9)
    data = tensors(data, getattr(torch, dtype))

    losses = []
    for plan in zip(*map(torch.as_tensor, plans), strict=True):
        number, total = len(plan[0]), torch.zeros((), dtype=getattr(torch, dtype))
        for i, micro_batch in enumerate(zip(*plan, strict=True), 1):
            with reduces_gradients(model, i == number):
                loss = model(data, Plan(*(x.long() for x in micro_batch)), group, i == number) / number
                loss.backward()
            total += loss.detach()
        optimiser.step()
        optimiser.zero_grad()
        if group:
            distributed.all_reduce(total, group=group)
        losses.append(total.item() / ranks)
    return losses


def main() -> None:
    parser = options_of("distil_torch.py", __doc__)
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help="for the student, under torchrun (ddp)")
    options = parser.parse_args()
    mesh, rank, ranks = None, 0, 1
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("batch",))
    inputs, plans = load_inputs(parser, options, rank, ranks)
    tell(
        {dtype: train(inputs, plans, dtype, mesh, options.engine) for dtype in options.dtype}, rank, ranks, options.json
    )
    if mesh:
        # gloo's threads release their last tensors here, while the interpreter is still running
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
