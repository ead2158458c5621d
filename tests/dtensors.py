"""The work of a rank in test_dtensors.py, which starts the ranks: all losses of the table on DTensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ranks import as_list, member, said
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kdtorch
from parity.calls import per_example
from parity.cases import KINDS, LOSSES, Loss, Sizes, draw, each_array

SIZES = Sizes(
    batch=(9,), classes=13, dim=7, num_data=11
)  # not divisible by 2 and 4; the last of 4 ranks has no examples
KEPT = np.array([1, 0, 1, 1, 0, 1, 1, 0, 1], bool)
LAYOUTS = {2: ("batch", "last", "whole"), 4: ("batch", "last", "both")}  # by ranks; "both": a mesh of 2 × 2
REDUCTIONS = ("mean", "none")


def inputs_of(loss: Loss) -> dict[str, Any]:
    return each_array(draw(loss, SIZES, 0)[0], lambda x: torch.from_numpy(np.array(x)))


def placements(kind: str, x: Tensor, layout: str) -> list:
    """The placements of an input: by examples, and by classes or features if it has a number for each of them."""
    axis = KINDS[kind].axis
    batch = Replicate() if axis is None else Shard(axis)
    rows = x.is_floating_point() and KINDS[kind].axes and kind != "kept_logits"
    last = Shard(x.ndim - 1) if rows else Replicate()
    return {"batch": [batch], "last": [last], "whole": [Replicate()], "both": [batch, last]}[layout]


def evaluate(loss: Loss, inputs: dict[str, Any], **options: Any) -> list[Tensor]:
    """The value and the gradients as whole tensors."""
    learned = [x for name in loss.learns for x in as_list(inputs[name])]
    given = {name: x for name, x in inputs.items() if name != loss.state}
    if loss.state:
        given[loss.state] = getattr(kdtorch, loss.inputs[loss.state])(**inputs[loss.state])
    for x in learned:
        x.requires_grad_()
    value = per_example(kdtorch, loss)(*(given[name] for name in loss.inputs), **options)
    value = value[0] if loss.state else value
    value.sum().backward()
    return [whole(value).detach(), *(whole(x.grad) for x in learned)]


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def every_loss(rank: int, ranks: int, folder: str) -> None:
    """The value and gradients, or the error, by loss, layout, mask and reduction."""
    with member(rank, ranks, folder):
        line = distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        square = distributed.device_mesh.init_device_mesh("cpu", (2, ranks // 2))
        results = {}
        for loss in LOSSES:
            for layout in LAYOUTS[ranks]:
                mesh = square if layout == "both" else line

                def spread(kind: str, x: Tensor, layout: str = layout, mesh: Any = mesh) -> Tensor:
                    return distribute_tensor(x, mesh, placements(kind, x, layout))

                for masked in (False, True):
                    for reduction in REDUCTIONS:
                        inputs = {
                            name: [spread(loss.inputs[name], y) for y in x]
                            if isinstance(x, list)
                            else x
                            if isinstance(x, dict)
                            else spread(loss.inputs[name], x)
                            for name, x in inputs_of(loss).items()
                        }
                        where = spread("labels", torch.from_numpy(KEPT)) if masked else None
                        try:
                            result = evaluate(loss, inputs, where=where, reduction=reduction)
                        except Exception as error:
                            result = f"{type(error).__name__}: {error}"
                        results[loss.title, layout, masked, reduction] = result
        torch.save(results, f"{folder}/{rank}.pt")


def row(name: str) -> Loss:
    return next(loss for loss in LOSSES if loss.name == name)


def mends_and_mistakes(rank: int, ranks: int, folder: str) -> None:
    with member(rank, ranks, folder):
        mesh = distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        group = mesh.get_group()
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
        labels, kept = torch.randint(5, (8,), generator=generator), torch.arange(8) % 3 > 0

        def spread(x: Tensor, place: Any = Shard(0), on: Any = mesh) -> Tensor:  # noqa: B008
            return distribute_tensor(x, on, [place])

        def mistake(name: str, *arguments: Any, **options: Any) -> str:
            return said(getattr(kdtorch, name), *arguments, **options)

        s, t = spread(student), spread(teacher)
        learned = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        other = distributed.device_mesh.DeviceMesh("cpu", list(reversed(range(ranks))))
        partial = DTensor.from_local(student / ranks, mesh, [Partial()])
        results: dict[str, Any] = {
            "plain labels": mistake("dkd_loss", s, t, labels),
            "a plain mask": mistake("kl_loss", s, t, where=kept),
            "a plain teacher": mistake("mse_loss", s, teacher),
            "a plain student": mistake("symmetric_kl_loss", student, t),
            "a plain temperature that learns": mistake("kl_loss", s, t, temperature=learned),
            "a group": mistake("kl_loss", s, t, group=group),
            "another mesh": mistake("kl_loss", s, spread(teacher, on=other)),
            "parts of a sum": mistake("kl_loss", partial, t),
            "classes in shards": mistake(
                "nkd_loss", *(spread(x, Shard(1)) for x in (student, teacher)), spread(labels)
            ),
            "fewer classes than shards": mistake("kl_loss", *(spread(x[:, :1], Shard(1)) for x in (student, teacher))),
            "soft labels in shards": mistake(
                "nkd_loss", s, t, spread(torch.nn.functional.one_hot(labels).double(), Shard(1))
            ),
            "a loss of pairs": mistake("difference_kl_loss", s, t),
            "a state": mistake(
                "dino_loss", *(spread(x.reshape(2, 4, 5), Shard(1)) for x in (student, teacher)), kdtorch.dino_init(5)
            ),
        }

        def slope(name: str, change: Any, *rest: Any, place: Any = Shard(0), **options: Any) -> list[Tensor]:  # noqa: B008
            x = spread(student, place).requires_grad_()
            value = getattr(kdtorch, name)(change(x), change(spread(teacher, place)), *rest, **options)
            value.backward()
            return [whole(value).detach(), whole(x.grad)]

        results["mended"] = {
            "full_tensor difference_kl_loss": slope("difference_kl_loss", whole),
            "full_tensor dkd_loss": slope("dkd_loss", whole, labels, place=Shard(1)),
            "redistribute dkd_loss": slope(
                "dkd_loss", lambda x: x.redistribute(placements=[Shard(0)]), spread(labels), place=Shard(1)
            ),
            "redistribute kl_loss": slope("kl_loss", lambda x: x.redistribute(placements=[Replicate()])),
            "a plain number kl_loss": slope("kl_loss", lambda x: x, temperature=torch.tensor(2.0)),
        }
        results["local"] = slope("difference_kl_loss", lambda x: x.to_local(), group=group)  # the part of this rank
        results["compiled"] = {}
        for place in (Shard(0), Shard(1)):
            torch._dynamo.reset()
            compiled = torch.compile(kdtorch.kl_loss, backend="aot_eager", fullgraph=True)
            x = spread(student, place).requires_grad_()
            value = compiled(x, spread(teacher, place), temperature=2.0)
            value.backward()
            results["compiled"][place.dim] = [whole(value).detach(), whole(x.grad)]
        results["compiled mistake"] = said(
            torch.compile(kdtorch.dkd_loss, backend="eager", fullgraph=True), s, t, labels
        )

        # so many classes that a CPU computes in blocks of rows
        student, teacher = torch.randn(2, 32, 2**15, generator=generator)
        labels = torch.randint(2**15, (32,), generator=generator)
        results["many classes"] = {}
        for name in ("kl_loss", "symmetric_kl_loss", "dkd_loss", "nkd_loss"):
            rest = (labels,) if name in ("dkd_loss", "nkd_loss") else ()
            x = student.clone().requires_grad_()
            value = getattr(kdtorch, name)(x, teacher, *rest)
            value.backward()
            shards = slope(name, lambda x: x, *map(spread, rest))
            results["many classes"][name] = [[value.detach(), x.grad], shards]
        torch.save(results, f"{folder}/{rank}.pt")
