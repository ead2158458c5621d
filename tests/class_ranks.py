"""The work of a rank in test_class_ranks.py, which starts the ranks; each rank has a part of the classes."""

import functools
import inspect
from collections.abc import Iterator

import torch
from ranks import member, said, tensors
from spread import UNEVEN, divided, drawn
from torch import Tensor, distributed

import kdtorch
from parity.cases import KINDS, LOSSES, Loss, Sizes, draw

TAKE = [x for x in LOSSES if "class_group" in inspect.signature(getattr(kdtorch, x.name)).parameters]
OF_LOGITS = [x for x in TAKE if list(x.inputs.values()) == ["logits", "logits"]]
FORMS = [(loss, i) for loss in TAKE for i in range(len(loss.options))]
# the numbers of classes on each rank, out of 8
PARTS = {1: {"even": [8]}, 2: {"even": [4, 4], "uneven": [1, 7]}, 4: {"even": [2, 2, 2, 2], "uneven": [1, 3, 1, 3]}}


def part(loss: Loss, inputs: dict, rank: int, sizes: list[int]) -> dict:
    """The inputs of a rank: its classes of inputs that have classes, and all of the others."""

    def own(name: str, x: Tensor) -> Tensor:
        axis = divided(loss.inputs[name])
        return x if axis is None else x.split(sizes, axis)[rank].contiguous()

    return {name: own(name, x) for name, x in inputs.items()}


def evaluate(loss: Loss, inputs: dict, options: dict, where: Tensor | None, **groups) -> dict:
    inputs = {k: x.detach().clone().requires_grad_() if k in loss.learns else x for k, x in inputs.items()}
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    options = {**options, "temperature": temperature, **groups}
    value = getattr(kdtorch, loss.name)(*(inputs[k] for k in loss.inputs), where=where, **options)
    value.backward()
    gradients = {k: inputs[k].grad for k in loss.learns}
    return {"value": value.detach(), "gradients": gradients, "temperature": temperature.grad}


def whole(loss: Loss, masked: bool) -> tuple[dict, Tensor | None]:
    (inputs,) = drawn(loss, UNEVEN if masked else None)
    return tensors(inputs), torch.from_numpy(UNEVEN) if masked else None


def every_loss(rank: int, ranks: int, folder: str) -> None:
    with member(rank, ranks, folder):
        group, results = distributed.group.WORLD, {}
        for loss, i in FORMS:
            for name, sizes in PARTS[ranks].items():
                for masked in (False, True):
                    inputs, where = whole(loss, masked)
                    own = part(loss, inputs, rank, sizes)
                    results[loss.title, i, name, masked] = evaluate(
                        loss, own, loss.options[i], where, class_group=group
                    )
        torch.save(results, f"{folder}/{rank}.pt")


def batch_by_classes(rank: int, ranks: int, folder: str) -> None:
    """Spread the batch over one axis of a mesh, and the classes over the other."""
    with member(rank, ranks, folder):
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
        groups = {"group": mesh.get_group("data"), "class_group": mesh.get_group("classes")}
        data, classes = mesh.get_local_rank("data"), mesh.get_local_rank("classes")
        results = {}
        for loss in TAKE:
            inputs, where = whole(loss, True)
            axes = {k: KINDS[kind].axis for k, kind in loss.inputs.items()}
            inputs = {k: x if axes[k] is None else x.chunk(2)[data] for k, x in inputs.items()}
            own = part(loss, inputs, classes, [3, 5])
            results[loss.title] = evaluate(loss, own, loss.options[-1], where.chunk(2)[data], **groups)
        torch.save(results, f"{folder}/{rank}.pt")


def hostile() -> tuple[Tensor, Tensor]:
    """Rows of 16 classes: equal rows, large logits, padded classes, and close rows."""
    student, teacher = map(torch.from_numpy, draw(OF_LOGITS[0], Sizes((8,), 16), 0)[0].values())
    student[0] = teacher[0]
    student[1] *= 1e3
    student[2, 7:] = teacher[2, 7:] = -torch.inf
    student[3, 8:] = teacher[3, 8:] = -torch.inf
    student[3, :8] = teacher[3, :8]
    teacher[4] = student[4] + 1e-3 * teacher[4]
    student[5] = 6e4 * student[5].sign()
    return student, teacher


def each_row(loss: Loss, student: Tensor, teacher: Tensor, **options) -> list[Tensor]:
    """The value of each row, and the gradient of a thousand times their sum."""
    student = student.clone().requires_grad_()
    value = getattr(kdtorch, loss.name)(student, teacher, reduction="none", **options)
    (1000 * value.sum()).backward()
    return [value.detach(), student.grad]


def counted(function) -> int:
    """The number of entries that the collectives send."""
    total, originals = 0, {}

    def counting(name: str, *arguments, **options):
        nonlocal total
        given = arguments[1] if name.startswith("all_gather") else arguments[0]
        total += given.numel()
        return originals[name](*arguments, **options)

    for name in ("all_reduce", "all_gather"):
        originals[name] = getattr(distributed, name)
        setattr(distributed, name, functools.partial(counting, name))
    function()
    for name, original in originals.items():
        setattr(distributed, name, original)
    return total


def transformed(loss: Loss, inputs: dict, take, **options) -> Iterator[tuple[str, list[Tensor]]]:
    """The results of a loss under torch.func and torch.compile; `take` returns a rank's part of an input."""
    first, *rest = (take(x) for x in inputs.values())
    function = functools.partial(getattr(kdtorch, loss.name), **options)
    gradient = torch.func.grad(function)
    yield "grad", [gradient(first, *rest)]
    yield "vmap", [torch.func.vmap(function)(first, *rest)]
    yield "vmap of grad", [torch.func.vmap(gradient)(first, *rest)]
    torch._dynamo.reset()
    x = first.clone().requires_grad_()
    value = torch.compile(function, backend="aot_eager", fullgraph=True)(x, *rest)
    value.backward()
    yield "compile", [value.detach(), x.grad]


def laws_and_mistakes(rank: int, ranks: int, folder: str) -> None:
    with member(rank, ranks, folder):
        group, results = distributed.group.WORLD, {}
        for loss in OF_LOGITS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                own = (x.to(dtype).split([9, 7], -1)[rank] for x in hostile())
                results["hostile", loss.title, str(dtype)] = each_row(loss, *own, class_group=group)

        for loss in TAKE:
            totals = []
            for classes in (64, 512):
                inputs = tensors(draw(loss, Sizes((16,), classes, kept=5), 0)[0])
                own = part(loss, inputs, rank, [classes // 2 + 3, classes // 2 - 3])
                totals.append(
                    counted(functools.partial(evaluate, loss, own, {}, None, class_group=group))  # forward and backward
                )
            results["counted", loss.title] = totals

        for loss in [x for x in TAKE if "logits" in x.inputs.values()]:
            inputs = tensors(draw(loss, Sizes((4,), 8), 0)[0])

            def take(x: Tensor, logits: torch.Size = inputs["student_logits"].shape) -> Tensor:
                return x.split([3, 5], -1)[rank] if x.shape == logits else x

            for name, got in transformed(loss, inputs, take, class_group=group):
                results["transformed", loss.title, name] = got

        x, y = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
        for loss in OF_LOGITS:
            function = functools.partial(getattr(kdtorch, loss.name), class_group=group)
            of = f" {loss.name}"
            results["rows" + of] = said(function, x[rank:], y[rank:])
            results["no class" + of] = said(function, x[:, 6 * rank :], y[:, 6 * rank :])
            results["one group" + of] = said(function, x, y, group=group)
            z = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(function(z, y), z, create_graph=True)
            results["second" + of] = said(slope.square().sum().backward)
            warm = torch.tensor(2.0, requires_grad=True)
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="eager", fullgraph=True)
            results["compiled temperature" + of] = said(compiled, z, y, temperature=warm)
        results["not a member"] = said(kdtorch.kl_loss, x, y, class_group=distributed.new_group([1]))
        rest, values = torch.zeros(4), x[:, :3]
        for name, places in (("index", [0, 11, 12]), ("negative", [0, -1, 3]), ("inside", [0, 11, 3])):
            indices = torch.tensor(places).expand(4, 3)
            results[name] = said(kdtorch.topk_kl_loss, x, values, indices, rest, class_group=group)
        many = torch.arange(13).expand(4, 13)
        results["many"] = said(kdtorch.topk_kl_loss, x, torch.zeros(4, 13), many, rest, class_group=group)
        results["no rest"] = said(kdtorch.topk_kl_loss, x, values, indices, class_group=group)
        mesh = distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        shards = (distributed.tensor.distribute_tensor(z, mesh, [distributed.tensor.Shard(1)]) for z in (x, y))
        results["DTensors"] = said(kdtorch.kl_loss, *shards, class_group=group)

        feat = dict(zip(("score_stu", "score_tea", "stu", "tea"), (x, y, x[:, :2], y[:, :2]), strict=True))
        for names in ("kld-jsd-mse", "kld-dkd"):
            model = {"METRIC_LOSS_TYPE": f"kd-{names}", "KD_LOSS_WEIGHT": [1.0] * (1 + names.count("-"))}
            combined = kdtorch.make_loss({"MODEL": model}, 6, 20)
            own = {k: v.split([2, 4], -1)[rank] if "score" in k else v for k, v in feat.items()}
            target = torch.arange(4)
            if "dkd" in names:
                results["combined mistake"] = said(combined, feat=own, target=target, class_group=group)
            else:
                results["combined"] = [combined(feat=own, class_group=group), combined(feat=feat)]
        torch.save(results, f"{folder}/{rank}.pt")


def alone(loss: Loss, i: int, masked: bool) -> dict:
    inputs, where = whole(loss, masked)
    return evaluate(loss, inputs, loss.options[i], where)


def close(a: Tensor, b: Tensor, ulps: float, bits: torch.dtype) -> bool:
    """Whether the rows agree within `ulps` ULP of the row's largest number."""
    a, b = a.double(), b.double()
    largest = b.abs().amax(-1, keepdim=True) if b.ndim > 1 else b.abs()
    return bool(((a - b).abs() <= ulps * torch.finfo(bits).eps * largest).all())
