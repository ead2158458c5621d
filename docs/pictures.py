"""One picture a loss for its page: docs/pictures/NAME.svg, drawn from the library itself.

Black on nothing; on a dark page site.css turns the colours around.
"""

import functools
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import kdtorch

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
TEACHER = [2.0, 0.5, -1.0]


def slope(loss, *learned):
    """The gradient of a function of these."""
    learned = [x.clone().requires_grad_() for x in learned]
    return torch.autograd.grad(loss(*learned), learned)


def curves(lines, moved, label, teacher=TEACHER, span=(-4, 8)):
    """Value and gradient of some settings of a loss, as one logit of the student moves and all others are the teacher's."""
    teacher = torch.tensor(teacher)
    gap = torch.linspace(*span, 241)
    logits = teacher.repeat(len(gap), 1)
    logits[:, moved] = gap
    _, (left, right) = plt.subplots(1, 2)
    for name, loss in lines.items():
        left.plot(gap, loss(logits, teacher.repeat(len(gap), 1)), label=name)
        (gradient,) = slope(lambda x, loss=loss: loss(x, teacher.repeat(len(gap), 1)).sum(), logits)
        right.plot(gap, gradient[:, moved])
    for axes, title in ((left, "value"), (right, "gradient")):
        axes.axvline(teacher[moved], color=GREY, linestyle=":", linewidth=1)
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.set(title=title, xlabel=label)
    left.legend()


def options(loss, key, values, *inputs, **fixed):
    """Lines of one loss with several values of one setting, a value an example."""
    names = {"temperature": "T", "alpha": "α", "beta": "β", "gamma": "γ"}
    return {
        f"{names[key]} = {value:g}": lambda s, t, value=value: loss(
            s, t, *(x.expand(len(s)) for x in inputs), reduction="none", **fixed, **{key: value}
        )
        for value in values
    }
