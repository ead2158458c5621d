"""The pictures of each loss's page: docs/pictures/NAME.svg, and NAME_phone.svg, drawn with the library itself.

The front matter of the page names a function of this file and its arguments, such as `curves temperature 1 2 4`. The
general functions are `curves` for logits, `plane` for features and `points` for relations between examples. Below them
are functions for a single loss. The pictures are black on a transparent background; on a dark page site.css inverts
them.
"""

from __future__ import annotations

import inspect
import pathlib
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from catalogue import Loss, by_family
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import kdtorch

Values = Callable[[Tensor], Tensor]  # from the rows of a student to the loss of each row, for a fixed teacher

FOLDER = pathlib.Path(__file__).parent / "pictures"
BLUE, RED, GREEN, GREY = "#1f5fb4", "#d1495b", "#2e8b57", "#8a8a8a"
WIDE, PHONE = (5.6, 2.7), (3.6, 2.7)  # in inches, of which a phone has 3.7
STYLE = {
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, RED, GREEN, "#b8860b"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "kdlosses",
}
LETTERS = {"alpha": "α", "beta": "β", "gamma": "γ", "mu": "μ", "temperature": "T"}
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.5], [-1.0, 0.0, 2.0]])


def lines(loss: Loss, words: Sequence[str]) -> dict[str, tuple[Callable[..., Tensor], dict[str, Any]]]:
    """The functions to compare, by the label of their line: a setting and its values, or `beside` and other losses."""
    if not words or words[0] == "beside":
        return {name.removesuffix("_loss"): (getattr(kdtorch, name), {}) for name in (loss.name, *words[1:])}
    option, *values = words
    settings = ({option: int(x) if x.isdigit() else float(x)} for x in values)
    names = (f"{LETTERS.get(option, option)} = {x}" for x in values)
    return {name: (getattr(kdtorch, loss.name), x) for name, x in zip(names, settings, strict=True)}


def slope(loss: Values, x: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a loss, and its gradient."""
    x = x.clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def pull(axes: Axes, loss: Values, points: Tensor, scale: float) -> None:
    """Draw arrows along the negative gradient; the longest one has the length `1 / scale` of the width."""
    against = -slope(loss, points)[1]
    axes.quiver(*points.T, *against.T, color=BLUE, width=0.008, scale=scale * float(against.norm(dim=1).max()))


def side_by_side(number: int = 2) -> tuple[Figure, Sequence[Axes]]:
    """Panels beside each other, and on a phone below each other."""
    width, height = plt.rcParams["figure.figsize"]
    rows = number if width < WIDE[0] else 1
    return plt.subplots(rows, number // rows, figsize=(width, rows * height))


def in_a_row(number: int) -> tuple[Figure, Sequence[Axes]]:
    """Small images beside each other, also on a phone."""
    width, _ = plt.rcParams["figure.figsize"]
    return plt.subplots(1, number, figsize=(width, 0.5 + 0.3 * width))


def legend_above(figure: Figure) -> None:
    """In one row, and on a phone in two."""
    figure.legend(loc="outside upper center", ncols=4 if figure.get_figwidth() == WIDE[0] else 2)


def circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1)


def round_axes(axes: Axes, title: str) -> None:
    axes.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, linewidth=0.5))
    axes.set(aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


def draw_curves(values: dict[str, Values], logits: Tensor, moved: int, whose: str, which: str) -> None:
    """Draw values and gradients over one logit of the student, whose other logits equal the teacher's."""
    moving = torch.linspace(-4, 8, 121)
    student = logits.repeat(len(moving), 1)
    student[:, moved] = moving
    figure, panels = side_by_side()
    for name, loss in values.items():
        value, gradient = slope(loss, student)
        panels[0].plot(moving, value, label=name)
        panels[1].plot(moving, gradient[:, moved])
    for panel, title in zip(panels, ("value", "gradient"), strict=True):
        panel.axvline(logits[moved], color=GREY, linestyle=":", label=whose if panel is panels[0] else None)
        panel.axhline(0, color=GREY, linewidth=0.5)
        panel.set(title=title, xlabel=f"the student's logit of {which}")
    legend_above(figure)


def curves(loss: Loss, *words: str) -> None:
    """Draw a loss of logits. With labels, a wrong class's logit moves; a loss that couples examples gets two more."""
    parameters = list(inspect.signature(getattr(kdtorch, loss.name)).parameters)
    logits = LOGITS if "couples" in loss.meta else LOGITS[:1]
    inputs = [torch.arange(len(logits))] if "labels" in parameters else []

    def values(function: Callable[..., Tensor], settings: dict[str, Any]) -> Values:
        def one(row: Tensor) -> Tensor:
            student = torch.cat([row[None], logits[1:]])
            if "student_weight" in parameters:  # identity heads, so that hidden states are the logits
                return function(student, torch.eye(student.shape[-1]), logits, torch.eye(student.shape[-1]), **settings)
            return function(student, logits, *inputs, **settings)

        return lambda student: torch.stack([one(row) for row in student])

    whose = "the weak head's" if "weak_logits" in parameters else "the teacher's"
    which = "another class" if inputs else "the likeliest class"
    compared = {name: values(*x) for name, x in lines(loss, words).items()}
    draw_curves(compared, logits[0], 1 if inputs else 0, whose, which)


def draw_plane(loss: Values, aim: Tensor) -> tuple[Axes, Axes]:
    """Draw where a feature of two numbers is pulled, and return the axes of this panel and of the one beside it."""
    _, (left, right) = side_by_side()
    ticks = torch.linspace(-2.5, 2.5, 101)
    height = loss(torch.cartesian_prod(ticks, ticks)).reshape(101, 101)
    left.contour(ticks, ticks, height.T, 10, colors=GREY, linewidths=0.4)
    pull(left, loss, torch.cartesian_prod(ticks[4::13], ticks[4::13]), 7)
    left.plot(*aim, "*", color=RED, markersize=11)
    left.set(aspect="equal", title="where the student is pulled", xlabel="first feature", ylabel="second feature")
    return left, right


def plane(loss: Loss, *words: str) -> None:
    """Draw a loss of features: the pull to a teacher at (0.9, 0.3), and gradients for one feature and a teacher at 0.

    The word `teacher` instead of a setting is followed by other teachers.
    """

    def values(function: Callable[..., Tensor], settings: dict[str, Any], teacher: Sequence[float] = (0.0,)) -> Values:
        options = {key: x for key, x in settings.items() if key != "teacher"}
        fixed = torch.tensor([settings["teacher"]]) if "teacher" in settings else torch.tensor(teacher)
        return lambda x: function(x, fixed.expand_as(x), reduction="none", **options)

    compared = lines(loss, words)
    grid = torch.cartesian_prod(*[torch.linspace(-2.5, 2.5, 101)] * 2)
    pulled = values(getattr(kdtorch, loss.name), {}, (0.9, 0.3))
    _, axes = draw_plane(pulled, grid[pulled(grid).argmin()])
    s = torch.linspace(-3, 3, 301)[:, None]
    for name, x in compared.items():
        axes.plot(s, slope(values(*x), s)[1], label=name)
    axes.axhline(0, color=GREY, linewidth=0.5)
    axes.set(title="gradient", xlabel="one feature of the student")
    legend_above(axes.figure)


def points(loss: Loss) -> None:
    """Draw a loss of relations: a few points of the teacher, the student's, and where gradient descent moves them."""
    teacher = circle(20.0, 50.0, 170.0, 215.0, 260.0)
    student = circle(10.0, 60.0, 110.0, 190.0, 290.0) * torch.tensor([0.7, 1.3, 1.0, 1.4, 0.8])[:, None]

    def value(x: Tensor) -> Tensor:
        return getattr(kdtorch, loss.name)(x, teacher)

    rate = 0.05 / slope(value, student)[1].norm(dim=1).max()
    path = [student]
    for _ in range(400):
        path.append(path[-1] - rate * slope(value, path[-1])[1])
    _, (left, right) = side_by_side()
    round_axes(left, "the teacher's distances")
    round_axes(right, "the student's pull, and where it ends")
    for axes, placed, color in ((left, teacher, RED), (right, student, BLUE)):
        axes.plot(*placed.T, "o", color=color)
        for i, point in enumerate(placed):
            axes.annotate(i + 1, point, 1.1 * point + 0.08, color=color)
            for other in placed[:i]:
                axes.plot(*zip(point, other, strict=True), color=color, linewidth=0.4)
    right.plot(*torch.stack(path).permute(2, 0, 1), color=GREEN, linewidth=1)
    right.plot(*path[-1].T, "o", color=GREEN, fillstyle="none")
    pull(right, value, student, 4)


def dcn(loss: Loss) -> None:
    teacher, centers = torch.tensor([0.9, 1.2]), 2 * circle(17.0)

    def value(x: Tensor) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.int64)
        return kdtorch.dcn_loss(x, teacher.expand_as(x), labels, centers, reduction="none")

    left, right = draw_plane(value, teacher)
    left.plot(*zip((0, 0), 1.3 * centers[0], strict=True), color=GREEN)
    left.add_patch(plt.Circle((0, 0), teacher.norm(), fill=False, color=RED, linestyle=":"))
    length = torch.linspace(0.05, 3, 200)[:, None]
    for degrees in (0, 45, 90):
        right.plot(length, value(length * circle(17.0 + degrees)), label=f"{degrees}° off")
    right.axvline(teacher.norm(), color=GREY, linestyle=":", label="the teacher")
    right.set(title="value", xlabel="the student's norm")
    legend_above(right.figure)


def crcd(loss: Loss) -> None:
    """Draw, on the unit circle, the relations of one sample to the anchors, and its loss at each angle."""
    memory = circle(20.0, 80.0, 140.0, 205.0, 250.0, 300.0)
    index, negatives = torch.arange(3), torch.tensor([[3, 4, 5]] * 3)
    state = kdtorch.CRCDState(memory, memory, torch.tensor(40.0), torch.tensor(40.0))
    student = circle(320.0, 110.0, 190.0)

    def value(x: Tensor) -> Tensor:
        return kdtorch.crcd_loss(x, memory[:3], index, negatives, state, temperature=0.5)[0]

    figure, (left, right) = side_by_side()
    round_axes(left, "relations of sample 1")
    for anchor in memory[1:3]:
        left.plot(*zip(anchor, memory[0], strict=True), color=RED, linestyle="--", linewidth=0.8)
        left.plot(*zip(anchor, student[0], strict=True), color=BLUE, linewidth=0.8)
    left.plot(*memory[:3].T, "*", color=RED, markersize=10, label="teacher, remembered")
    left.plot(*memory[3:].T, "x", color=GREY, label="negatives")
    left.plot(*student.T, "o", color=BLUE, label="student")
    pull(left, value, student, 3)
    for i, point in enumerate(memory[:3]):
        left.annotate(i + 1, point, 1.2 * point - 0.05, color=RED)
    legend_above(figure)
    degrees = torch.arange(-120.0, 240.0, 2)
    right.plot(degrees, [value(torch.cat([circle(float(x)), student[1:]])) for x in degrees])
    right.axvline(20, color=RED, linestyle=":")
    right.set(title="value", xlabel="degrees of sample 1")


def crd(loss: Loss) -> None:
    """Draw, on the unit circle, one sample among negatives, and its loss at each angle."""
    memory = circle(20.0, 150.0, 200.0, 250.0, 300.0)
    figure, (left, right) = side_by_side()
    student = circle(95.0)

    def value(x: Tensor, number: int) -> Tensor:
        index, negatives = torch.tensor([0]), torch.arange(1, 1 + number)[None]
        state = kdtorch.CRDState(memory, memory, torch.tensor(10.0), torch.tensor(10.0))
        return kdtorch.crd_loss(x, memory[:1], index, negatives, state, temperature=0.5)[0]

    round_axes(left, "embeddings")
    left.plot(*memory[:1].T, "*", color=RED, markersize=10, label="teacher, remembered")
    left.plot(*memory[1:].T, "x", color=GREY, label="negatives")
    left.plot(*student.T, "o", color=BLUE, label="student")
    pull(left, lambda x: value(x, 4), student, 1)
    legend_above(figure)
    degrees = torch.arange(-120.0, 240.0, 2)
    for number in (1, 2, 4):
        right.plot(degrees, [value(circle(float(x)), number) for x in degrees], label=f"K = {number}")
    right.axvline(20, color=RED, linestyle=":")
    right.set(title="value", xlabel="degrees of the student")
    right.legend()


def minilm(loss: Loss) -> None:
    """Draw the relations of five tokens, and the loss as one token of the student turns."""
    teacher, student = 2 * circle(0.0, 30.0, 90.0, 180.0, 200.0), 2 * circle(0.0, 60.0, 90.0, 170.0, 230.0)
    _, panels = side_by_side(3)
    for panel, title, x in zip(panels, ("the teacher", "the student"), (teacher, student), strict=False):
        panel.imshow(torch.softmax(x @ x.T / x.shape[1] ** 0.5, -1), vmin=0, vmax=0.6, cmap="Blues")
        panel.set(title=title, xlabel="token", ylabel="token", xticks=range(5), yticks=range(5))
    degrees = torch.arange(0.0, 360.0, 3)
    for token in (1, 4):
        values = []
        for x in degrees:
            turned = torch.cat([teacher[:token], 2 * circle(float(x)), teacher[token + 1 :]])
            values.append(kdtorch.minilm_loss(turned[None], teacher[None], relation_heads=1))
        panels[2].plot(degrees, values, label=f"token {token}")
    panels[2].set(title="value", xlabel="degrees of the token")
    panels[2].legend()


def dino(loss: Loss) -> None:
    """Draw a teacher with the same output for all examples, and the centre that removes it."""
    rng = np.random.default_rng(0)
    teacher = torch.tensor(0.05 * rng.normal(size=(2, 64, 6)) + np.array([0.3, 0.0, 0.05, -0.05, 0.0, 0.1]))
    student = torch.zeros(2, 64, 6, dtype=teacher.dtype)
    _, (left, right) = side_by_side()
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


def ibot(loss: Loss) -> None:
    """Draw the loss of a student's patch for a fixed patch of the teacher, and the centre over steps."""
    _, (left, right) = side_by_side()
    moving, masked = torch.linspace(-0.4, 0.8, 121), torch.ones(121, 1, dtype=torch.bool)
    student, teacher = torch.zeros(121, 1, 3), torch.tensor([0.15, 0.05, 0.0]).expand(121, 1, 3)
    student[:, 0, 0] = moving
    for temperature in (0.04, 0.07, 0.2):
        value, _ = kdtorch.ibot_loss(
            student, teacher, masked, kdtorch.ibot_init(3), teacher_temperature=temperature, reduction="none"
        )
        left.plot(moving, value, label=f"τ = {temperature}")
    left.set(title="value", xlabel="the student's output")
    left.legend()
    patches = torch.tensor([0.3, 0.0, 0.1]) + 0.3 * torch.randn(60, 8, 6, 3, generator=torch.Generator().manual_seed(0))
    for number, name in ((6, "all masked"), (1, "one in six masked")):
        state, centers = kdtorch.ibot_init(3), []
        for step, x in enumerate(patches):
            centers.append(state.center)
            mask = (torch.arange(6) < number * (not 20 <= step < 30)).expand(8, 6)
            _, state = kdtorch.ibot_loss(x, x, mask, state)
        right.plot(torch.stack(centers)[:, 0], label=name)
    right.axhline(0.3, color=GREY, linestyle=":", label="the teacher's mean")
    right.axvspan(20, 30, color=GREY, alpha=0.2, label="none masked")
    right.set(title="the centre of output 1", xlabel="steps")
    right.legend()


def koleo(loss: Loss) -> None:
    """Draw where features on the circle are pushed, and the value over the distance of two."""
    features = circle(10.0, 30.0, 100.0, 140.0, 160.0, 280.0)
    _, (left, right) = side_by_side()
    round_axes(left, "away from the nearest")
    left.plot(*features.T, "o", color=BLUE)
    pull(left, kdtorch.koleo_loss, features, 4)
    degrees = torch.linspace(1, 180, 180)
    pairs = [circle(0.0, float(x)) for x in degrees]
    distances = [float((a - b).norm()) for a, b in pairs]
    right.plot(distances, [kdtorch.koleo_loss(x) for x in pairs], label="value")
    right.axhline(0, color=GREY, linewidth=0.5)
    right.set(title="two features", xlabel="distance")


def gram(loss: Loss) -> None:
    """Draw the cosines of eight patches; the teacher has two kinds of patches."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.tensor([[1.0, 0.0, 0.3]] * 3 + [[0.0, 1.0, 0.3]] * 5)
    teacher = (kinds + 0.2 * torch.randn(8, 3, generator=rng))[None]
    student = (torch.tensor([0.6, 0.6, 0.3]) + 0.35 * torch.randn(8, 3, generator=rng))[None]

    def cosines(x: Tensor) -> Tensor:
        x = torch.nn.functional.normalize(x[0], dim=-1)
        return x @ x.T

    images = {"teacher": cosines(teacher), "student": cosines(student)}
    images["pull on the student"] = images["teacher"] - images["student"]
    _, panels = in_a_row(3)
    for axes, (title, image) in zip(panels, images.items(), strict=True):
        axes.imshow(image, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set(title=title, xticks=[], yticks=[])


def sinkhorn(loss: Loss) -> None:
    """Draw how often each prototype is used by a teacher that prefers one."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(0.3 * rng.normal(size=(64, 6)) + np.array([0.5, 0.0, 0.1, -0.1, 0.0, 0.2]))
    _, (left, right) = side_by_side()
    shares = {"softmax": (logits / 0.1).softmax(-1), "Sinkhorn-Knopp": kdtorch.sinkhorn_knopp(logits, temperature=0.1)}
    for offset, (name, q) in zip((-0.2, 0.2), shares.items(), strict=True):
        left.bar(np.arange(1, 7) + offset, q.mean(0), 0.4, label=name)
    left.set(title="mean assignment", xlabel="prototype")
    left.legend()
    steps = range(1, 9)
    for temperature in (0.05, 0.1, 0.2):
        most = [kdtorch.sinkhorn_knopp(logits, temperature=temperature, iterations=n).mean(0).max() for n in steps]
        right.semilogy(steps, [6 * float(x) - 1 for x in most], label=f"T = {temperature}")
    right.set(title="the most used above 1 / K, times K", xlabel="iterations")
    right.legend()


def hcl(loss: Loss) -> None:
    """Draw the difference of two maps, and the pull of the whole maps and of the pooled ones."""
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
    _, panels = in_a_row(3)
    for axes, (title, image) in zip(panels, images.items(), strict=True):
        limit = image.abs().max()
        axes.imshow(image[0, 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(title=title, xticks=[], yticks=[])


def feature_maps(loss: Loss) -> None:
    """Draw the sums of two channels with a bump in each: the student's, the teacher's, and the student's pull."""
    y, x = np.mgrid[:12, :12]

    def bumps(*places: tuple[int, int]) -> Tensor:
        noise = 0.1 * np.random.default_rng(len(places)).normal(size=(len(places), 12, 12))
        return torch.tensor(noise + [1.5 * np.exp(-((x - i) ** 2 + (y - j) ** 2) / 8) for i, j in places])[None]

    student, teacher = bumps((3, 4), (5, 7)), bumps((8, 4), (7, 7))
    function = getattr(kdtorch, loss.name)
    listed = "student_maps" in inspect.signature(function).parameters
    pull = -slope(lambda s: function([s], [teacher]) if listed else function(s, teacher), student)[1]
    images = {"student": student, "teacher": teacher, "pull on the student": pull}
    _, panels = in_a_row(3)
    for axes, (title, image) in zip(panels, images.items(), strict=True):
        summed = image[0].sum(0)
        limit = summed.abs().max()
        axes.imshow(summed, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(title=title, xticks=[], yticks=[])


def panels(images: dict[str, Tensor], cmap: str) -> None:
    """Draw small matrices side by side; the colours of a matrix with both signs are centred at 0."""
    _, axes = in_a_row(len(images))
    for panel, (title, image) in zip(axes, images.items(), strict=True):
        limit = float(image.abs().max())
        both = bool((image < 0).any())
        panel.imshow(image, cmap="RdBu_r" if both else cmap, vmin=-limit if both else 0, vmax=limit)
        panel.set(title=title, xticks=[], yticks=[])


def cosine(loss: Loss) -> None:
    aim = torch.tensor([0.9, 0.3])

    def value(x: Tensor) -> Tensor:
        return kdtorch.cosine_loss(x, aim.expand_as(x), reduction="none")

    left, right = draw_plane(value, aim)
    left.plot(*zip((0, 0), 2.6 * aim, strict=True), color=GREEN)
    degrees, start = torch.linspace(-180, 180, 181), float(torch.atan2(aim[1], aim[0]).rad2deg())
    for length in (0.5, 1.0, 2.0):
        points = length * torch.cat([circle(start + float(x)) for x in degrees])
        right.plot(degrees, slope(value, points)[1].norm(dim=1), label=f"norm {length:g}")
    right.set(title="size of the gradient", xlabel="degrees from the teacher")
    legend_above(right.figure)


def cwd(loss: Loss) -> None:
    """Draw one channel of the student and of the teacher, and the pull on the student's."""
    y, x = np.mgrid[:16, :16]

    def bump(row: float, column: float) -> Tensor:
        return torch.tensor(4 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 12))[None, None]

    student, teacher = bump(9, 10) + bump(3, 4) / 2, bump(5, 5)
    against = -slope(lambda s: kdtorch.cwd_loss(s, teacher), student)[1]
    images = {"the student": student, "the teacher": teacher}
    shares = {name: z.flatten(2).softmax(-1).reshape(16, 16) for name, z in images.items()}
    panels(shares | {"pull": against[0, 0]}, "Greys")


def vid(loss: Loss) -> None:
    def value(error: Tensor, variance: Tensor) -> Tensor:
        return ((error**2 / variance) + variance.log()) / 2

    error, variance = torch.linspace(-3, 3, 121), torch.linspace(0.05, 4, 200)
    figure, (left, right) = side_by_side()
    for v in (0.25, 1.0, 4.0):
        left.plot(error, value(error, torch.tensor(v)), label=f"variance {v:g}")
    left.set(title="value", xlabel="μ − t")
    for e in (0.5, 1.0, 1.5):
        right.plot(variance, value(torch.tensor(e), variance), linestyle="--", label=f"error {e:g}")
    right.set(title="value", xlabel="variance", ylim=(-1.5, 3))
    legend_above(figure)


def fsp(loss: Loss) -> None:
    """Draw the products of six channels with eight for both networks, and their difference."""
    rng = np.random.default_rng(0)

    def flow(seen: np.ndarray) -> Tensor:
        maps = [np.maximum(seen @ rng.normal(size=(5, n)), 0) for n in (6, 8)]
        return torch.tensor(maps[0].T @ maps[1] / len(seen))

    seen = rng.normal(size=(64, 5))
    ours, theirs = flow(seen), flow(seen)
    panels({"the student": ours, "the teacher": theirs, "difference": ours - theirs}, "Greys")


def symmetric_kl(loss: Loss) -> None:
    def forward(s: Tensor) -> Tensor:
        return kdtorch.kl_loss(s, LOGITS[:1].expand_as(s), reduction="none")

    def symmetric(s: Tensor) -> Tensor:
        return kdtorch.symmetric_kl_loss(s, LOGITS[:1].expand_as(s), reduction="none")

    def reverse(s: Tensor) -> Tensor:
        return 2 * symmetric(s) - forward(s)

    compared: dict[str, Values] = {"KL(q‖p)": forward, "symmetric": symmetric, "KL(p‖q)": reverse}
    draw_curves(compared, LOGITS[0], 0, "the teacher's", "the likeliest class")


def topk_kl(loss: Loss) -> None:
    logits = torch.tensor([2.0, 0.5, -0.5, 0.0, -1.0, -1.5])

    def kept(number: int, tail: str) -> Values:
        def value(s: Tensor) -> Tensor:
            t = logits.expand_as(s)
            values, indices = t.topk(number)
            rest = t.scatter(1, indices, -torch.inf).logsumexp(1)
            return kdtorch.topk_kl_loss(s, values, indices, rest, tail=tail, reduction="none")

        return value

    compared = {"all": kept(6, "bucket"), "2 and the rest": kept(2, "bucket"), "2 alone": kept(2, "renormalize")}
    draw_curves(compared, logits, 2, "the teacher's", "a class not kept")


def standardize(loss: Loss) -> None:
    """Draw rows of logits that differ in scale and level, before and after standardisation."""
    rows = {"z": LOGITS[:1], "3 z": 3 * LOGITS[:1], "z / 2 + 2": LOGITS[:1] / 2 + 2}
    figure, panels = side_by_side()
    for panel, title, function in zip(
        panels, ("logits", "standardised"), (lambda x: x, kdtorch.standardize_logits), strict=True
    ):
        for i, (name, row) in enumerate(rows.items()):
            place = np.arange(1, 4) + 0.25 * (i - 1)
            panel.bar(place, function(row)[0], 0.25, label=name if panel is panels[0] else None)
        panel.axhline(0, color=GREY, linewidth=0.5)
        panel.set(title=title, xlabel="class", xticks=[1, 2, 3])
    legend_above(figure)


def sampled_kl(loss: Loss) -> None:
    """Draw the three estimates for a token that the student has sampled, and their derivatives."""
    ratio = torch.linspace(-3, 3, 121)
    teacher = torch.full_like(ratio, -4.0)
    figure, panels = side_by_side()
    for estimator in ("k1", "k2", "k3"):

        def value(x: Tensor, estimator: Any = estimator) -> Tensor:
            options = {"estimator": estimator, "gradient": "direct", "reduction": "none"}
            return kdtorch.sampled_kl_loss(x, teacher, **options)

        for panel, y in zip(panels, slope(value, teacher + ratio), strict=True):
            panel.plot(ratio, y, label=estimator if panel is panels[0] else None)
    for panel, title in zip(panels, ("value", "derivative by log p"), strict=True):
        panel.axhline(0, color=GREY, linewidth=0.5)
        panel.set(title=title, xlabel="log p − log q of a token", ylim=(-3.5, 6))
    legend_above(figure)


DRAW: tuple[Callable[..., None], ...] = (
    curves,
    plane,
    points,
    dcn,
    crcd,
    crd,
    minilm,
    dino,
    gram,
    ibot,
    koleo,
    sinkhorn,
    hcl,
    cosine,
    cwd,
    vid,
    fsp,
    feature_maps,
    symmetric_kl,
    standardize,
    topk_kl,
    sampled_kl,
)

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    known = {draw.__name__: draw for draw in DRAW}
    for loss in (loss for losses in by_family().values() for loss in losses):
        kind, *words = loss.meta["picture"].split()
        if kind not in known:
            raise SystemExit(f"docs/losses/{loss.name}.md: `picture` begins with one of {list(known)}, got {kind!r}")
        for size, end in ((WIDE, ""), (PHONE, "_phone")):
            with matplotlib.rc_context(STYLE | {"figure.figsize": size}):
                known[kind](loss, *words)
                for axes in plt.gcf().axes if end else ():
                    axes.set_title(textwrap.fill(axes.get_title(), 12 if axes.get_images() else 40))
                plt.savefig(FOLDER / f"{loss.name}{end}.svg", metadata={"Date": None})
                plt.close()
