"""A temperature that is learned: its gradient, alone and mixed with that of the student, in every loss that has one."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import BOTH, JAX, TORCH

from parity.cases import LOSSES, Case, Sizes, draw
from parity.run import run

# the setting of each loss that has a gradient if it is an array; all others are constants
LEARNED = {
    loss.title: next(name for name in loss.ranges if name in ("temperature", "student_temperature"))
    for loss in LOSSES
    if {"temperature", "student_temperature"} & set(loss.ranges)
}
learned = pytest.mark.parametrize("loss", [x for x in LOSSES if x.title in LEARNED], ids=lambda loss: loss.title)
framework = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
KEPT = np.array([True, False, True, True, False])
STEP = 1e-5


def test_which_losses_have_one():
    """Every loss with a parameter called a temperature, but for the teacher's."""
    for loss in LOSSES:
        parameters = inspect.signature(getattr(TORCH.kd, loss.name)).parameters
        named = {name for name in parameters if "temperature" in name} - {"teacher_temperature"}
        assert named == {LEARNED[loss.title]} if loss.title in LEARNED else not named


@dataclasses.dataclass
class Drawn:
    """A loss as a function of its first input and its temperature, in float64, on inputs that have been drawn."""

    f: object
    loss: object
    twist: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    classes: int = 7

    def __post_init__(self):
        (inputs,) = draw(self.loss, Sizes(classes=self.classes), 3)
        logits = [name for name, kind in self.loss.inputs.items() if kind == "logits"]
        if self.twist == "padded":
            for name in logits:
                inputs[name][..., -1] = -np.inf
            if "labels" in inputs:
                labels = inputs["labels"]
                inputs["labels"] = labels % (self.classes - 1) if labels.ndim == 1 else np.roll(labels, 0)
        if self.twist == "wide":
            for name in logits:
                inputs[name] *= 30
        if self.twist == "near":
            inputs[self.loss.learns[0]] = inputs[self.loss.constant[0]] + 1e-6 * inputs[self.loss.learns[0]]
        self.inputs = self.f.arrays(inputs)
        if self.loss.state:
            state = {k: v if v.ndim else v + 5.0 for k, v in self.inputs[self.loss.state].items()}
            self.inputs[self.loss.state] = getattr(self.f.kd, self.loss.inputs[self.loss.state])(**state)
        self.x = self.inputs[self.loss.learns[0]]

    def __call__(self, x, temperature):
        inputs = {**self.inputs, self.loss.learns[0]: x}
        function = getattr(self.f.kd, self.loss.name)
        result = function(*(inputs[k] for k in self.loss.inputs), **{LEARNED[self.loss.title]: temperature}, **self.options)
        return result[0] if self.loss.state else result

    def at(self, temperature):
        return self.f.array(np.array(temperature))

    @functools.cached_property
    def temperature(self):
        low, high = self.loss.ranges[LEARNED[self.loss.title]]
        return low + 0.3 * (high - low)


def difference(function, at):
    """Central, of fourth order."""
    near, far = ((function(at + s * at * STEP * 100) - function(at - s * at * STEP * 100)) for s in (1, 2))
    return (8 * near - far) / (12 * at * STEP * 100)


def is_slope(got, want, rel=1e-6):
    assert np.asarray(got) == pytest.approx(np.asarray(want), rel=rel, abs=1e-8 * (1 + np.abs(want).max(initial=0)))


OPTIONS = ({}, {"reduction": "sum"}, {"where": KEPT}, {"where": KEPT, "reduction": "sum"})


@learned
@framework
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "mean")
@pytest.mark.parametrize("twist", ["", "padded", "wide", "near"])
def test_its_gradient(f, loss, options, twist):
    if twist == "padded" and not loss.padding or twist == "near" and not loss.divergence or twist == "wide" and not loss.shift_invariant:
        pytest.skip("means nothing here")
    value = Drawn(f, loss, twist, {k: f.array(v) if k == "where" else v for k, v in options.items()})
    at = value.temperature
    slope = f.jit(f.grad(lambda t: value(value.x, t)))(value.at(at))
    is_slope(f.numpy(slope), difference(lambda t: float(f.jit(lambda t: value(value.x, t))(value.at(t))), at), rel=1e-5 if twist == "near" else 1e-6)
