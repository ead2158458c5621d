"""One picture a loss for its page: docs/pictures/NAME.svg, drawn from the library itself.

Black on nothing; on a dark page site.css turns the colours around.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import kdtorch

Alone = Callable[[Tensor], Tensor]  # of the student
Pair = Callable[[Tensor, Tensor], Tensor]  # of student and teacher

FOLDER = pathlib.Path(__file__).parent / "pictures"
BLUE, RED, GREEN, GREY = "#1f5fb4", "#d1495b", "#2e8b57", "#8a8a8a"
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, RED, GREEN, "#b8860b"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.figsize": (5.6, 2.7),
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "kdlosses",
}
ALONE, OTHERS = torch.zeros(0, 3), torch.tensor([[0.0, 1.0, 0.5], [-1.0, 0.0, 2.0]])


def slope(loss: Alone, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def pull(axes: Axes, loss: Alone, points: Tensor, scale: float) -> None:
    """Arrows against the gradient, the longest one `1 / scale` of the width."""
    against = -slope(loss, points)[1]
    axes.quiver(*points.T, *against.T, color=BLUE, width=0.008, scale=scale * float(against.norm(dim=1).max()))


def circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1)


def round_axes(axes: Axes, title: str) -> None:
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, linewidth=0.5))
    axes.set(aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def each(
    loss: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    settings: dict[str, float],
    others: Tensor,
    students: Tensor,
    teachers: Tensor,
) -> Tensor:
    """A loss of as many batches as there are rows: a row, and others that stay."""
    rows = ([torch.cat([x[None], others]) for x in pair] for pair in zip(students, teachers, strict=True))
    return torch.stack([loss(*pair, *inputs, **settings) for pair in rows])


def family(
    loss: Callable[..., Tensor], option: str, values: Sequence[float], *inputs: Tensor, others: Tensor = ALONE
) -> dict[str, Pair]:
    """One loss with several values of one setting."""
    letter = {"temperature": "T", "beta": "β", "gamma": "γ"}[option]
    return {f"{letter} = {x:g}": functools.partial(each, loss, inputs, {option: x}, others) for x in values}


def curves(
    lines: dict[str, Pair], moved: int = 0, logits: Sequence[float] = (2.0, 0.5, -1.0), whose: str = "the teacher's"
) -> None:
    """Values and gradients as one logit of the student moves and the others are the teacher's."""
    teacher = torch.tensor(logits)
    moving = torch.linspace(-4, 8, 121)
    student = teacher.repeat(len(moving), 1)
    student[:, moved] = moving
    figure, panels = plt.subplots(1, 2)
    for name, loss in lines.items():
        value, gradient = slope(lambda x, loss=loss: loss(x, teacher.expand_as(x)), student)
        panels[0].plot(moving, value, label=name)
        panels[1].plot(moving, gradient[:, moved])
    for panel, title in zip(panels, ("value", "gradient"), strict=True):
        panel.axvline(teacher[moved], color=GREY, linestyle=":", label=whose if panel is panels[0] else None)
        panel.axhline(0, color=GREY, linewidth=0.5)
        panel.set(
            title=title,
            xlabel=f"the student's logit of {('the likeliest class', 'another class', 'a class not kept')[moved]}",
        )
    figure.legend(loc="outside upper center", ncols=4)


def plane(loss: Alone, aim: Sequence[float], profile: Callable[[Axes], None]) -> Axes:
    """Where a feature of two numbers is pulled; beside it what `profile` draws."""
    figure, (left, right) = plt.subplots(1, 2)
    ticks = torch.linspace(-2.5, 2.5, 101)
    height = loss(torch.cartesian_prod(ticks, ticks)).reshape(101, 101)
    left.contour(ticks, ticks, height.T, 10, colors=GREY, linewidths=0.4)
    pull(left, loss, torch.cartesian_prod(ticks[4::13], ticks[4::13]), 7)
    left.plot(*aim, "*", color=RED, markersize=11)
    left.set(aspect="equal", title="where the student is pulled", xlabel="first feature", ylabel="second feature")
    profile(right)
    figure.legend(loc="outside upper right", ncols=4)
    return left


def to(loss: Callable[..., Tensor], teacher: float | Sequence[float], **settings: float) -> Alone:
    return lambda x: loss(x, torch.tensor(teacher).expand_as(x), reduction="none", **settings)


def regression(
    loss: Callable[..., Tensor], teacher: Sequence[float], aim: Sequence[float], lines: dict[str, Alone], title: str
) -> None:
    """A plane, and values or gradients of several losses of one feature."""

    def profile(axes: Axes) -> None:
        s = torch.linspace(-3, 3, 301)[:, None]
        for name, line in lines.items():
            axes.plot(s, slope(line, s)[title == "gradient"], label=name)
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.set(title=title, xlabel="one feature of the student")

    plane(to(loss, teacher), aim, profile)


def dcn() -> None:
    teacher, centers = torch.tensor([0.9, 1.2]), 2 * circle(17.0)

    def loss(x: Tensor) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.int64)
        return kdtorch.dcn_loss(x, teacher.expand_as(x), labels, centers, reduction="none")

    def profile(axes: Axes) -> None:
        length = torch.linspace(0.05, 3, 200)[:, None]
        for degrees in (0, 45, 90):
            towards = circle(17.0 + degrees)
            axes.plot(length, loss(length * towards), label=f"{degrees}° off")
        axes.axvline(teacher.norm(), color=GREY, linestyle=":", label="the teacher")
        axes.set(title="value", xlabel="the student's norm")

    left = plane(loss, teacher, profile)
    left.plot(*zip((0, 0), 1.3 * centers[0], strict=True), color=GREEN)
    left.add_patch(plt.Circle((0, 0), teacher.norm(), fill=False, color=RED, linestyle=":"))


def euclidean_mse() -> None:
    """A few points of the student, where they go, and the teacher's."""
    teacher = circle(20.0, 50.0, 170.0, 215.0, 260.0)
    student = circle(10.0, 60.0, 110.0, 190.0, 290.0) * torch.tensor([0.7, 1.3, 1.0, 1.4, 0.8])[:, None]

    def loss(x: Tensor) -> Tensor:
        return kdtorch.euclidean_mse_loss(x, teacher)

    path = [student]
    for _ in range(400):
        path.append(path[-1] - 0.3 * slope(loss, path[-1])[1])
    _, (left, right) = plt.subplots(1, 2)
    round_axes(left, "the teacher's distances")
    round_axes(right, "the student's pull, and where it ends")
    for axes, points, color in ((left, teacher, RED), (right, student, BLUE)):
        axes.plot(*points.T, "o", color=color)
        for i, point in enumerate(points):
            axes.annotate(i + 1, point, 1.1 * point + 0.08, color=color)
            for other in points[:i]:
                axes.plot(*zip(point, other, strict=True), color=color, linewidth=0.4)
    right.plot(*torch.stack(path).permute(2, 0, 1), color=GREEN, linewidth=1)
    right.plot(*path[-1].T, "o", color=GREEN, fillstyle="none")
    pull(right, loss, student, 4)


def crcd() -> None:
    """On the unit circle: the relations of one sample to the anchors, and its loss wherever it may be."""
    memory = circle(20.0, 80.0, 140.0, 205.0, 250.0, 300.0)
    index, negatives = torch.arange(3), torch.tensor([[3, 4, 5]] * 3)
    state = kdtorch.CRCDState(memory, memory, torch.tensor(40.0), torch.tensor(40.0))
    student = circle(320.0, 110.0, 190.0)

    def loss(x: Tensor) -> Tensor:
        return kdtorch.crcd_loss(x, memory[:3], index, negatives, state, temperature=0.5)[0]

    figure, (left, right) = plt.subplots(1, 2)
    round_axes(left, "relations of sample 1")
    for anchor in memory[1:3]:
        left.plot(*zip(anchor, memory[0], strict=True), color=RED, linestyle="--", linewidth=0.8)
        left.plot(*zip(anchor, student[0], strict=True), color=BLUE, linewidth=0.8)
    left.plot(*memory[:3].T, "*", color=RED, markersize=10, label="teacher, remembered")
    left.plot(*memory[3:].T, "x", color=GREY, label="negatives")
    left.plot(*student.T, "o", color=BLUE, label="student")
    pull(left, loss, student, 3)
    for i, point in enumerate(memory[:3]):
        left.annotate(i + 1, point, 1.2 * point - 0.05, color=RED)
    figure.legend(loc="outside upper center", ncols=3)
    degrees = torch.arange(-120.0, 240.0, 2)
    right.plot(degrees, [loss(torch.cat([circle(float(x)), student[1:]])) for x in degrees])
    right.axvline(20, color=RED, linestyle=":")
    right.set(title="value", xlabel="degrees of sample 1")


def dino() -> None:
    """A teacher that gives one output to all examples, and the centre that takes it away."""
    rng = np.random.default_rng(0)
    teacher = torch.tensor(0.05 * rng.normal(size=(2, 64, 6)) + np.array([0.3, 0.0, 0.05, -0.05, 0.0, 0.1]))
    student = torch.zeros(2, 64, 6, dtype=teacher.dtype)
    _, (left, right) = plt.subplots(1, 2)
    for momentum in (0.8, 0.9, 0.95):
        state, centers = kdtorch.dino_init(6, dtype=torch.float64), []
        for _ in range(60):
            centers.append(state.center)
            _, state = kdtorch.dino_loss(student, teacher, state, center_momentum=momentum)
        right.plot(torch.stack(centers)[:, 0], label=f"momentum {momentum}")
    right.axhline(teacher.mean((0, 1))[0], color=GREY, linestyle=":", label="the teacher's mean")
    right.set(title="the centre of output 1", xlabel="steps")
    right.legend()
    for offset, center, name in ((-0.2, 0, "before"), (0.2, state.center, "after")):
        share = torch.softmax((teacher - center) / 0.04, -1).mean((0, 1))
        left.bar(np.arange(1, 7) + offset, share, 0.4, label=f"{name} centring")
    left.set(title="the teacher's mean target", xlabel="output", ylim=(0, 1.05))
    left.legend()


def hcl() -> None:
    """A difference of two maps, and the pull of the whole maps and of the pooled ones."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:16, :16]
    bump = 1.5 * np.exp(-((x - 4) ** 2 + (y - 5) ** 2) / 16)
    student = torch.tensor(bump + 0.7 * rng.normal(size=(16, 16)))[None, None]
    teacher = torch.zeros_like(student)
    whole = -8 / 15 * slope(lambda s: torch.square(s - teacher).mean(), student)[1]
    everything = -slope(lambda s: kdtorch.hcl_loss([s], [teacher]), student)[1]
    images = {
        "student − teacher": student,
        "pull of the whole map": whole,
        "pull of the pooled maps": everything - whole,
    }
    _, panels = plt.subplots(1, 3, figsize=(5.6, 2.2))
    for axes, (title, image) in zip(panels, images.items(), strict=True):
        limit = image.abs().max()
        axes.imshow(image[0, 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(title=title, xticks=[], yticks=[])


def symmetric_kl() -> None:
    losses = {"KL(q‖p)": kdtorch.kl_loss, "symmetric": kdtorch.symmetric_kl_loss}
    lines = {name: functools.partial(each, loss, (), {}, ALONE) for name, loss in losses.items()}
    curves(lines | {"KL(p‖q)": lambda s, t: 2 * lines["symmetric"](s, t) - lines["KL(q‖p)"](s, t)})


def topk_kl() -> None:
    logits = (2.0, 0.5, -0.5, 0.0, -1.0, -1.5)

    def kept(number: int, tail: str) -> Pair:
        def loss(s: Tensor, t: Tensor) -> Tensor:
            values, indices = t.topk(number)
            rest = t.scatter(1, indices, -torch.inf).logsumexp(1)
            return kdtorch.topk_kl_loss(s, values, indices, rest, tail=tail, reduction="none")

        return loss

    lines = {"all": kept(6, "bucket"), "2 and the rest": kept(2, "bucket"), "2 alone": kept(2, "renormalize")}
    curves(lines, moved=2, logits=logits)


MSE, HUBER, BCE = kdtorch.mse_loss, kdtorch.smooth_l1_loss, kdtorch.bce_loss
LABEL = torch.tensor([0])
PICTURES: dict[str, Callable[[], Any]] = {
    "kl_loss": lambda: curves(family(kdtorch.kl_loss, "temperature", (1, 2, 4))),
    "symmetric_kl_loss": symmetric_kl,
    "difference_kl_loss": lambda: curves(family(kdtorch.difference_kl_loss, "temperature", (1, 2, 4), others=OTHERS)),
    "topk_kl_loss": topk_kl,
    "dkd_loss": lambda: curves(family(kdtorch.dkd_loss, "beta", (0, 1, 8), LABEL), moved=1),
    "nkd_loss": lambda: curves(family(kdtorch.nkd_loss, "gamma", (0, 1.5, 4), LABEL), moved=1),
    "uskd_loss": lambda: curves(
        family(kdtorch.uskd_loss, "beta", (0, 0.1, 1), torch.arange(3), others=OTHERS), 1, whose="the weak head's"
    ),
    "bce_loss": lambda: regression(
        BCE, [0.9, 0.3], [2.2, -0.85], {f"teacher {t}": to(BCE, t) for t in (0.5, 0.9, 1.2)}, "value"
    ),
    "mse_loss": lambda: regression(
        MSE, [0.8, 0.5], [0.8, 0.5], {"MSE": to(MSE, 0.0), "smooth L1": to(HUBER, 0.0)}, "gradient"
    ),
    "smooth_l1_loss": lambda: regression(
        HUBER, [0.8, 0.5], [0.8, 0.5], {f"β = {b}": to(HUBER, 0.0, beta=b) for b in (0.25, 1, 3)}, "gradient"
    ),
    "hcl_loss": hcl,
    "dcn_loss": dcn,
    "euclidean_mse_loss": euclidean_mse,
    "crcd_loss": crcd,
    "dino_loss": dino,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw()
            plt.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
            plt.close()
