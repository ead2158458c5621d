"""Trained temperatures: first and second derivatives, also mixed with the student, in all losses that have one."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import BOTH, JAX, TORCH
from tiers import first, slow

from kdtorch import _numerics as numerics
from parity.calls import per_example
from parity.cases import LOSSES, MAPS, Loss, Sizes, draw

pytestmark = pytest.mark.usefixtures("quick_compilation")
# the setting of each loss that has a gradient if it is an array; all others are constants
LEARNED = {
    loss.title: next(name for name in loss.ranges if name in ("temperature", "student_temperature"))
    for loss in LOSSES
    if loss.learns and {"temperature", "student_temperature"} & set(loss.ranges)
}
learned = pytest.mark.parametrize("loss", [x for x in LOSSES if x.title in LEARNED], ids=lambda loss: loss.title)
framework = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
KEPT = np.array([True, False, True, True, False])


def test_which_losses_have_one():
    """All losses with a parameter called a temperature, except that of a teacher."""
    for loss in (x for x in LOSSES if x.learns):
        parameters = inspect.signature(getattr(TORCH.kd, loss.name)).parameters
        named = {name for name in parameters if "temperature" in name} - {"teacher_temperature"}
        assert named == {LEARNED[loss.title]} if loss.title in LEARNED else not named


@dataclasses.dataclass
class Drawn:
    """A loss as a function of its first input and its temperature, in float64, with random other inputs."""

    f: Any
    loss: Loss
    twist: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        (inputs,) = draw(self.loss, Sizes(), 3)
        logits = [name for name, kind in self.loss.inputs.items() if kind == "logits"]
        for name in logits:
            if self.twist == "padded":
                inputs[name][..., -1] = -np.inf
            if self.twist == "wide":
                inputs[name] *= 30
        if self.twist == "padded" and "labels" in inputs:
            inputs["labels"] %= Sizes().classes - 1
        if self.twist == "near":
            inputs[self.loss.learns[0]] = inputs[self.loss.constant[0]] + 1e-6 * inputs[self.loss.learns[0]]
        self.inputs = self.f.arrays(inputs)
        self.function = per_example(self.f.kd, self.loss)
        if self.f is JAX and MAPS & set(self.loss.inputs.values()):
            self.options = {**self.options, "channel_axis": 1}
        if self.loss.state:
            state = {k: v if v.ndim else v + 5.0 for k, v in self.inputs[self.loss.state].items()}
            self.inputs[self.loss.state] = getattr(self.f.kd, self.loss.inputs[self.loss.state])(**state)
        self.x = self.inputs[self.loss.learns[0]]
        low, high = self.loss.ranges[LEARNED[self.loss.title]]
        self.temperature = low + 0.3 * (high - low)

    def __call__(self, x, temperature, **options):
        inputs = {**self.inputs, self.loss.learns[0]: x}
        options = {
            k: self.f.array(v) if isinstance(v, np.ndarray) else v for k, v in {**self.options, **options}.items()
        }
        result = self.function(
            *(inputs[k] for k in self.loss.inputs), **{LEARNED[self.loss.title]: temperature}, **options
        )
        return result[0] if self.loss.state else result


def slope_of(f, function, at):
    """The derivative of a function of a temperature, by a central difference of fourth order.

    The function returns what is differentiated first; what it returns besides is for its other callers, which share
    the compiled program.
    """
    step = 1e-3 * at
    near, far = (
        f.numpy(function(f.array(np.array(at + d)))[0]) - f.numpy(function(f.array(np.array(at - d)))[0])
        for d in (step, 2 * step)
    )
    return (8 * near - far) / (12 * step)


def agree(got, want, rel=1e-6):
    size = np.abs(want).max(initial=0)
    assert np.abs(np.asarray(got) - want).max(initial=0) <= rel * size + 1e-10, (got, want)


OPTIONS = ({}, {"where": KEPT, "reduction": "sum"})


@learned
@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
@pytest.mark.parametrize("twist", first(1, ["", "padded", "wide", "near"]))
def test_its_gradient(f, loss, twist):
    """It equals central differences, including T², for a mean and for a masked sum."""
    if not {"": True, "padded": loss.padding, "wide": loss.shift_invariant, "near": loss.divergence}[twist]:
        pytest.skip("means nothing for this loss")
    value = Drawn(f, loss, twist)
    at = f.array(np.array(value.temperature))
    for options in OPTIONS:

        def both(t, options=options):
            return value(value.x, t, **options), f.grad(lambda t: value(value.x, t, **options))(t)

        both = f.jit(both)
        want = slope_of(f, both, value.temperature)
        agree(f.numpy(both(at)[1]), want, rel=1e-4 if twist == "near" else 1e-6)


def refuses_second_derivatives(f, loss):
    return f is TORCH and not loss.second_derivative


@pytest.mark.slow
@learned
@framework
def test_its_second_derivatives(f, loss):
    """With respect to T twice, and to T and the student in both orders; or an error that says so."""
    value = Drawn(f, loss, "", {"where": KEPT})
    at, direction = f.array(np.array(value.temperature)), f.array(np.cos(f.numpy(value.x)))

    def along(t):
        return (f.grad(lambda x: value(x, t))(value.x) * direction).sum()

    def cooling(x, t):
        return f.grad(lambda t: value(x, t))(t)

    if refuses_second_derivatives(f, loss):
        for second in (lambda: f.grad(along)(at), lambda: f.grad(cooling)(value.x, at)):
            with pytest.raises(NotImplementedError, match="no second derivative"):
                second()
        return

    @f.jit
    def everything(t):
        first = {"jax": jnp, "torch": torch}[f.name].stack([along(t), cooling(value.x, t)])
        return first, f.grad(along)(t), f.grad(cooling)(value.x, t), f.grad(lambda t: cooling(value.x, t))(t)

    of_gradient, of_slope = slope_of(f, everything, value.temperature)
    _, one, other, twice = map(f.numpy, everything(at))
    agree(one, of_gradient)
    agree((other * f.numpy(direction)).sum(), of_gradient)
    agree(twice, of_slope)


@slow
@learned
def test_both_packages(loss):
    """Both give the same derivatives for T, for the student, and for the two mixed."""
    results = []
    for f in BOTH:
        value = Drawn(f, loss)
        at = f.array(np.array(value.temperature))

        def derivatives(x, t, f=f, value=value):
            found = [f.grad(lambda t: value(x, t))(t), f.grad(lambda x: value(x, t))(x)]
            if not refuses_second_derivatives(TORCH, loss):
                found.append(f.grad(lambda x: f.grad(lambda t: value(x, t))(t))(x))
            return found

        results.append([f.numpy(x) for x in f.jit(derivatives)(value.x, at)])
    for ours, theirs in zip(*results, strict=True):
        agree(ours, theirs, rel=1e-11)


@pytest.mark.slow
@learned
@framework
def test_one_for_each_of_a_stack(f, loss):
    """`vmap` of the gradient, and the gradient of `vmap`."""
    value = Drawn(f, loss, "", {"where": KEPT})
    scales = np.array([0.7, 1.0, 1.6]) * value.temperature
    vmap = {"jax": jax.vmap, "torch": torch.func.vmap}[f.name]
    each = f.jit(f.grad(lambda t: value(value.x, t)))
    want = np.stack([f.numpy(each(f.array(np.array(t)))) for t in scales])
    together = f.grad(lambda ts: vmap(lambda t: value(value.x, t))(ts).sum())
    for got in f.jit(lambda ts: (vmap(each)(ts), together(ts)))(f.array(scales)):
        agree(f.numpy(got), want, 1e-11)


@learned
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_parameter(loss, dtype):
    """A float32 `torch.nn.Parameter` with logits in half precision, also with large batches, which use blocks."""
    (inputs,) = draw(loss, Sizes((9,), 300, 40), 0)
    state = inputs.pop(loss.state, None)
    slopes = []
    for precision in ("float64", dtype):
        given = TORCH.arrays(
            {k: v.astype(np.float16) if v.dtype.kind == "f" and dtype != "bfloat16" else v for k, v in inputs.items()},
            dtype,
        )
        given = {k: v.to(getattr(torch, precision)) if v.is_floating_point() else v for k, v in given.items()}
        wide = "float64" if precision == "float64" else "float32"
        if state:
            given[loss.state] = getattr(TORCH.kd, loss.inputs[loss.state])(**TORCH.arrays(state, wide))
        name = LEARNED[loss.title]
        temperature = torch.nn.Parameter(torch.tensor(np.mean(loss.ranges[name]), dtype=getattr(torch, wide)))
        result = per_example(TORCH.kd, loss)(**given, **{name: temperature})
        (result[0] if loss.state else result).backward()
        slopes.append(temperature.grad.item())
    assert temperature.grad.dtype == torch.float32
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@learned
def test_compiled(loss):
    """Under `torch.compile`, with a trained student and with a constant one."""
    torch._dynamo.reset()
    value = Drawn(TORCH, loss, "", {"where": KEPT})
    results = []
    for learns in (True, False):
        for function in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
            x, t = value.x.clone().requires_grad_(learns), torch.tensor(value.temperature, requires_grad=True)
            function(x, t).backward()
            results.append([t.grad.numpy(), *([x.grad.numpy()] if learns else [])])
    for one, other in (results[:2], results[2:]):
        for got, want in zip(one, other, strict=True):
            agree(got, want, 1e-11)


@pytest.mark.slow
@learned
@framework
def test_a_bad_one_is_nan(f, loss):
    value = Drawn(f, loss)
    both = f.jit(lambda t: (value(value.x, t), f.grad(lambda t: value(value.x, t))(t)))
    for bad in (0.0, -1.0, np.inf, np.nan):
        assert all(np.isnan(f.numpy(x)) for x in both(f.array(np.array(bad))))


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.ranges], ids=lambda loss: loss.title)
def test_any_other_setting_is_a_constant(loss):
    """In kdtorch another setting that requires a gradient is an error, because it would get none."""
    (inputs,) = draw(loss, Sizes(), 0)
    inputs = TORCH.arrays(inputs)
    if loss.state:
        inputs[loss.state] = getattr(TORCH.kd, loss.inputs[loss.state])(**inputs[loss.state])
    for name in loss.ranges.keys() - {LEARNED.get(loss.title)}:
        setting = torch.tensor(0.5, requires_grad=True)
        call = functools.partial(per_example(TORCH.kd, loss), **inputs, **{name: setting})
        with pytest.raises(ValueError, match=rf"`{name}` is a constant .* give {name}\.detach\(\)"):
            call()
        with torch.no_grad():
            call()
        with pytest.raises(ValueError, match="is a constant"):
            torch.func.grad(lambda t, name=name: per_example(TORCH.kd, loss)(**inputs, **{name: t}))(setting.detach())


@pytest.mark.parametrize(
    "check", [numerics.positive, numerics.non_negative, numerics.fraction], ids=lambda x: x.__name__
)
def test_a_setting_is_constant_where_nothing_is_checked(check):
    """Only `checked` raises an error for such a setting; with KDLOSSES_CHECK=0 it has no gradient, as in kdjax."""
    constant = {"constant": True} if check is numerics.positive else {}
    number = torch.tensor(0.5, requires_grad=True)
    assert not check("x", number, torch.zeros(1), **constant).requires_grad
    assert numerics.positive("x", number, torch.zeros(1)).requires_grad
