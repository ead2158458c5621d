"""The PyTorch half of `digits.py`: `torch.nn` and `torch.optim`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtorch import (
    alpha_beta_loss,
    bce_loss,
    difference_kl_loss,
    dist_loss,
    dkd_loss,
    euclidean_mse_loss,
    hcl_loss,
    jsd_loss,
    kl_loss,
    mse_loss,
    nkd_loss,
    reverse_kl_loss,
    skew_kl_loss,
    skew_reverse_kl_loss,
    smooth_l1_loss,
    standardize_logits,
    symmetric_kl_loss,
    taid_loss,
    tvd_loss,
    uld_loss,
)
from kdtorch.nn import CRCDLoss, DINOLoss, DynamicCenterNormLoss, ReviewKD, USKDLoss

if TYPE_CHECKING:
    from digits import Plan, Setting


class Output(NamedTuple):
    """The outputs of a network for images: its logits, embedding and feature maps."""

    logits: Tensor
    embedding: Tensor
    maps: list[Tensor]


class Net(nn.Module):
    """Two convolutions and two linear layers, for the teacher and, narrower, for the student."""

    def __init__(self, channels: tuple[int, int], width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 3, padding=1)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, padding=1)
        self.embed = nn.Linear(16 * channels[1], width)
        self.head = nn.Linear(width, classes)
        for layer in self.children():
            nn.init.kaiming_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Output:
        first = self.conv1(images[:, None]).relu()
        second = self.conv2(functional.max_pool2d(first, 2)).relu()
        embedding = self.embed(second.permute(0, 2, 3, 1).flatten(1))  # in the order of JAX, whose channels are last
        return Output(self.head(embedding.relu()), embedding, [first, second])


class Batch:
    """A batch and the student's outputs for it; losses gather their other inputs from the data."""

    def __init__(self, net: Net, data: Mapping[str, Any], plan: Plan) -> None:
        self.net, self.data, self.index, self.shifts, self.negatives = net, data, *plan
        self.student = net(data["views"][0, self.index])

    def given(self, name: str) -> Tensor:
        return self.data[name][self.index]

    def teacher(self, name: str) -> Any:
        x = self.data["teacher"][name]
        return [each[self.index] for each in x] if isinstance(x, list) else x[self.index]

    def two_views(self, views: Tensor) -> Tensor:
        """Each image under its two shifts, stacked along the batch axis."""
        return views[self.shifts.reshape(-1), self.index.repeat(2)]


class Loss(NamedTuple):
    """How a loss is called, and the module that holds its parameters or state, if it has any."""

    value: Callable[[Any, Batch], Tensor]
    module: Callable[[Setting], nn.Module] | None = None


def projection(setting: Setting) -> nn.Linear:
    return nn.Linear(setting.student[1], setting.teacher[1])


def review(setting: Setting) -> ReviewKD:
    return ReviewKD(setting.student[0], setting.teacher[0], 16)


def projection_and_centers(setting: Setting) -> nn.ModuleDict:
    centers = DynamicCenterNormLoss(setting.classes, setting.teacher[1])
    return nn.ModuleDict({"projection": projection(setting), "loss": centers})


def crcd(setting: Setting) -> CRCDLoss:
    return CRCDLoss(setting.student[1], setting.teacher[1], 32, setting.images)


def dino(setting: Setting) -> DINOLoss:
    return DINOLoss(setting.classes, warmup_temperature=0.5, teacher_temperature=0.5, student_temperature=1.0)


def uskd(setting: Setting) -> USKDLoss:
    return USKDLoss(setting.student[1], setting.classes)


def standardized(batch: Batch) -> list[Tensor]:
    """The standardised logits of student and teacher, which have the same scale."""
    return [standardize_logits(x) for x in (batch.student.logits, batch.teacher("logits"))]


LOSSES = {
    "kl": Loss(lambda _, b: kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "skl": Loss(lambda _, b: symmetric_kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "diff": Loss(lambda _, b: difference_kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "dkd": Loss(lambda _, b: dkd_loss(b.student.logits, b.teacher("logits"), b.given("labels"), where=b.given("sure"))),
    "nkd": Loss(lambda _, b: nkd_loss(b.student.logits, b.teacher("logits"), b.given("labels"), where=b.given("sure"))),
    "uskd": Loss(lambda m, b: m(b.student.embedding, b.student.logits, b.given("labels"), where=b.given("sure")), uskd),
    "reverse_kl": Loss(lambda _, b: reverse_kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "jsd": Loss(lambda _, b: jsd_loss(b.student.logits, b.teacher("logits"))),
    "tvd": Loss(lambda _, b: tvd_loss(b.student.logits, b.teacher("logits"))),
    "skew_kl": Loss(lambda _, b: skew_kl_loss(b.student.logits, b.teacher("logits"))),
    "skew_reverse_kl": Loss(lambda _, b: skew_reverse_kl_loss(b.student.logits, b.teacher("logits"))),
    "alpha_beta": Loss(lambda _, b: alpha_beta_loss(b.student.logits, b.teacher("logits"))),
    "taid": Loss(lambda _, b: taid_loss(b.student.logits, b.teacher("logits"), interpolation=0.5)),
    "uld": Loss(lambda _, b: uld_loss(b.student.logits, b.teacher("logits"))),
    "dist": Loss(lambda _, b: dist_loss(b.student.logits, b.teacher("logits"))),
    "std_kl": Loss(lambda _, b: kl_loss(*standardized(b), temperature=2.0)),
    "mse": Loss(lambda m, b: mse_loss(m(b.student.embedding), b.teacher("embedding")), projection),
    "sml": Loss(lambda m, b: smooth_l1_loss(m(b.student.embedding), b.teacher("embedding")), projection),
    "bce": Loss(lambda m, b: bce_loss(m(b.student.embedding), b.teacher("embedding").sigmoid()), projection),
    "eu_mse": Loss(lambda _, b: euclidean_mse_loss(b.student.embedding, b.teacher("embedding"))),
    "dcn": Loss(
        lambda m, b: m["loss"](
            m["projection"](b.student.embedding), b.teacher("embedding"), b.given("labels"), where=b.given("sure")
        ),
        projection_and_centers,
    ),
    "hcl": Loss(lambda m, b: hcl_loss(m(b.student.maps), b.teacher("maps")), review),
    "crcd": Loss(lambda m, b: m(b.student.embedding, b.teacher("embedding"), b.index, b.negatives), crcd),
    "dino": Loss(
        lambda m, b: m(b.net(b.two_views(b.data["views"])).logits, b.two_views(b.data["teacher"]["views"])), dino
    ),
}


class Distiller(nn.Module):
    """A student with the parameters and states of its losses."""

    def __init__(self, weights: Mapping[str, float], setting: Setting) -> None:
        super().__init__()
        self.student = Net(*setting.student, setting.classes)
        self.extras = nn.ModuleDict({n: LOSSES[n].module(setting) for n in weights if LOSSES[n].module})
        self.weights = tuple(weights.items())

    def forward(self, data: Mapping[str, Any], plan: Plan) -> Tensor:
        """The cross-entropy of labelled images, and the weighted losses."""
        batch = Batch(self.student, data, plan)
        labelled, labels = batch.given("labelled"), batch.given("labels")
        loss = functional.cross_entropy(batch.student.logits[labelled], labels[labelled])
        for name, weight in self.weights:
            module = dict(self.extras).get(name)
            loss = loss + weight * LOSSES[name].value(module, batch)
        return loss


def label_loss(teacher: nn.Module, data: Mapping[str, Any], plan: Plan) -> Tensor:
    """The teacher's objective, on images under their first shift."""
    logits = teacher(data["views"][plan.shifts[0], plan.index]).logits
    return functional.cross_entropy(logits, data["labels"][plan.index])


def fit(
    modules: Sequence[nn.Module], objective: Callable[..., Tensor], data: Any, plans: Sequence[Plan], rate: float
) -> list[dict[str, Any]]:
    """Train modules, each with its own plan."""
    runs = []
    for module, plan in zip(modules, plans, strict=True):
        optimiser = torch.optim.SGD(module.parameters(), rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(plan.index))
        batches, losses = zip(*(torch.as_tensor(x).long() for x in plan), strict=True), []
        start = time.perf_counter()
        for batch in batches:
            loss = objective(module, data, type(plan)(*batch))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        seconds = time.perf_counter() - start
        runs.append({"losses": torch.stack(losses).double().numpy(), "seconds": seconds})
    return runs


@torch.no_grad()
def predict(module: Net, images: np.ndarray) -> Output:
    """Outputs as NumPy arrays, with channels-last maps."""
    logits, embedding, maps = module(torch.as_tensor(images))
    return Output(logits.numpy(), embedding.numpy(), [x.permute(0, 2, 3, 1).numpy() for x in maps])


def count(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


def make_teacher(data: Mapping[str, Any], plan: Plan, setting: Setting) -> Net:
    """A trained teacher."""
    torch.manual_seed(0)
    teacher = Net(*setting.teacher, setting.classes)
    fit([teacher], label_loss, tensors(data, torch.float32), [plan], setting.teacher_rate)
    return teacher


def train_teacher(data: Mapping[str, Any], plan: Plan, setting: Setting, views: np.ndarray) -> dict[str, Any]:
    """A teacher's outputs for all images: logits for every shift, embeddings and maps without a shift."""
    teacher = make_teacher(data, plan, setting)
    shifts, images, *shape = views.shape
    output = predict(teacher, views.reshape(-1, *shape))
    return {
        "logits": output.logits.reshape(shifts, images, -1),
        "embedding": output.embedding[:images],
        "maps": [x[:images] for x in output.maps],
        "parameters": count(teacher),
    }


def initial_weights(weights: Mapping[str, float], setting: Setting) -> dict[str, np.ndarray]:
    """The initial weights of a student and its losses, by name."""
    torch.manual_seed(0)
    return {name: x.numpy() for name, x in Distiller(weights, setting).state_dict().items()}


def train_students(
    weights: Mapping[str, float],
    data: Mapping[str, Any],
    plans: Sequence[Plan],
    setting: Setting,
    images: np.ndarray,
    dtype: str = "float32",
    start: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Train one student per plan, with weighted losses; returns its logits for `images`, its losses and the time."""
    modules = []
    for seed in range(len(plans)):
        torch.manual_seed(seed)
        modules.append(Distiller(weights, setting).to(getattr(torch, dtype)))
        if start:
            modules[-1].load_state_dict({name: torch.as_tensor(x) for name, x in start.items()})
    runs = fit(modules, Distiller.__call__, tensors(data, getattr(torch, dtype)), plans, setting.student_rate)
    for module, run in zip(modules, runs, strict=True):
        run["logits"] = predict(module.student, images.astype(dtype)).logits
        run["parameters"] = count(module.student)
        run["parameters_of_losses"] = count(module) - count(module.student)
    return runs


def tensors(tree: Any, dtype: torch.dtype) -> Any:
    """Arrays as tensors: floating-point numbers in `dtype`, integers in int64, maps with channels first."""
    if isinstance(tree, Mapping):
        return {name: tensors(x, dtype) for name, x in tree.items()}
    if isinstance(tree, list):
        return [tensors(x, dtype).permute(0, 3, 1, 2).contiguous() for x in tree]
    x = torch.as_tensor(tree)
    return x.to(dtype) if x.is_floating_point() else x if x.dtype == torch.bool else x.long()
