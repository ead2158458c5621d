"""The check of arguments: what it accepts, what it costs, what it leaves alone, and warnings of missing gradients."""

import contextlib
import inspect
import os
import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers
import torch
import torch._dynamo.testing
from flax import nnx
from frameworks import BOTH, JAX, TORCH

import kdtorch._typing
from kdlosses import checks
from parity import calls
from parity.calls import masked_axes, per_example
from parity.cases import LOSSES, MAPS, Sizes, draw, each_array

both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
SIZES = Sizes(batch=(3,), classes=5, dim=4, num_data=7)
pytestmark = pytest.mark.usefixtures("quick_compilation")
compiled = pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports


def arguments(f, loss, sizes=SIZES, dtype="float32", seed=0):
    """The inputs of a loss by name, as the framework's arrays; the state is the package's own."""
    (inputs,) = draw(loss, sizes, seed)
    for name in (k for k in inputs if f is JAX and loss.inputs[k] in MAPS):  # channels last
        inputs[name] = each_array(inputs[name], lambda x: np.moveaxis(x, 1, -1))
    inputs = f.arrays(inputs, dtype)
    if loss.state:
        inputs[loss.state] = getattr(f.kd, loss.inputs[loss.state])(**inputs[loss.state])
    return inputs


def evaluate(f, loss, inputs, **options):
    widened = loss.value == "array" or ("where" in options and masked_axes(loss))
    function = per_example(f.kd, loss) if widened else loss.of(f.kd)
    value = function(*(inputs[name] for name in loss.inputs), **options)
    return value[0] if loss.state else value


def settings(loss):
    """The options of a loss that are numbers."""
    plan, _ = checks.read(getattr(kdtorch, loss.name).__wrapped__)
    return [argument.name for argument in plan.arguments if argument.forms[0].kind == "Scalar"]


SETTINGS = [(loss, name) for loss in LOSSES if not loss.title.endswith("-soft") for name in settings(loss)]
LEARNED = ("temperature", "student_temperature")
every_setting = pytest.mark.parametrize(
    ("loss", "name"), SETTINGS, ids=[f"{loss.name}-{name}" for loss, name in SETTINGS]
)


def run_alone(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [
    "import kdlosses.checks, sys; assert not {'jax', 'torch', 'numpy'} & set(sys.modules)",
    """
import sys, torch, kdtorch, kdtorch.nn
x = torch.ones(2, 3)
kdtorch.kl_loss(x, x), kdtorch.dino_loss(x[None].repeat(2, 1, 1), x[None], kdtorch.dino_init(3))
kdtorch.nn.DINOLoss(3)(x, x)
try:
    kdtorch.kl_loss(x, x[:1])
except TypeError:
    pass
assert not {'jax', 'jaxlib', 'kdjax', 'flax'} & set(sys.modules)
""",
    """
import sys, jax.numpy as jnp, kdjax
kdjax.kl_loss(jnp.ones((2, 3)), jnp.ones((2, 3)))
assert not {'torch', 'kdtorch', 'flax.nnx'} & set(sys.modules) - {'flax.nnx'}
""",
], ids=["checks", "kdtorch", "kdjax"])  # fmt: skip
def test_no_framework_is_imported_but_the_package_s_own(code):
    run_alone(code)


@both
def test_what_is_decorated_stays_documented(f):
    for loss in LOSSES:
        function = getattr(f.kd, loss.name)
        assert function.__doc__.splitlines()[0]
        assert list(inspect.signature(function).parameters)[: len(loss.inputs)] == list(loss.inputs)
        assert pickle.loads(pickle.dumps(function)) is function
        assert function.__code__.co_name == loss.name or f is JAX
    assert len({getattr(kdtorch, loss.name).__code__ for loss in LOSSES}) == len({loss.name for loss in LOSSES})


@both
def test_every_annotation_is_read(f):
    """Each argument is an array, a number or of a known type. The losses themselves check choices among texts, the
    `rest` of
    top-k, which may be a mapping by temperature, and a soft cap, which may be a pair."""
    for loss in LOSSES:
        plan, _ = checks.read(getattr(f.kd, loss.name).__wrapped__)
        free = {a.name for a in plan.arguments if any(form.kind == "any" for form in a.forms)}
        assert free <= {
            "reduction",
            "tail",
            "divergence",
            "rest",
            "estimator",
            "sampled_from",
            "gradient",
            "clip_negative",
            "memory",
            "softcap",
        }


@pytest.mark.parametrize(
    ("shape", "axes", "fits"),
    [
        ((), "", True),
        ((1,), "", False),
        ((2, 3), "batch dim", True),
        ((2, 3), "batch batch", False),
        ((3, 3), "batch batch", True),
        ((2, 3, 4), "batch dim", False),
        ((2, 3, 4), "batch _ _", True),
        ((3,), "*batch classes", True),
        ((), "*batch classes", False),
        ((2, 3, 4), "*batch classes", True),
        ((), "*batch", True),
    ],
)
def test_axes(shape, axes, fits):
    assert checks._axes_fit(shape, tuple(axes.split()), {}) == fits


def test_axes_that_do_not_fit_bind_nothing():
    sizes = {"dim": 4}
    assert not checks._axes_fit((2, 3), ("batch", "dim"), sizes)
    assert sizes == {"dim": 4}
    assert checks._axes_fit((2, 3, 4), ("*batch", "dim"), sizes)
    assert not checks._axes_fit((6, 4), ("*batch", "dim"), sizes)
    assert sizes == {"batch": (2, 3), "dim": 4} or sizes == {"*batch": (2, 3), "dim": 4}


@every
def test_a_call_like_one_that_passed_is_not_checked_again(loss, monkeypatch):
    inputs = arguments(TORCH, loss, Sizes(batch=(4,), classes=6, dim=3))
    options = {} if loss.value == "array" else {"where": torch.arange(4) > 0}
    evaluate(TORCH, loss, inputs, **options)
    checked = []
    monkeypatch.setattr(checks, "check", lambda *arguments: checked.append(arguments[0].function) or [])
    evaluate(TORCH, loss, inputs, **options)
    assert not checked
    first = next(iter(inputs))
    for change in (torch.Tensor.double, torch.Tensor.requires_grad_, lambda x: x.to("meta")):
        given = inputs[first]
        changed = [change(x.clone()) for x in given] if isinstance(given, list) else change(given.clone())
        with contextlib.suppress(RuntimeError):  # errors that the check would have raised earlier
            evaluate(TORCH, loss, {**inputs, first: changed}, **options)
    with torch.no_grad():
        evaluate(TORCH, loss, inputs, **options)
    assert checked == [loss.name] * 4


@compiled
@pytest.mark.parametrize("loss", tiers.one_of_a_kind(LOSSES), ids=lambda loss: loss.title)
def test_two_graphs_for_many_shapes(loss):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(per_example(kdtorch, loss), backend=counter, fullgraph=True)
    for batch in (4, 5, 6, 7):
        inputs = arguments(TORCH, loss, Sizes(batch=(batch,), classes=9, dim=10, num_data=13))
        function(*(inputs[name] for name in loss.inputs), where=torch.arange(batch) != 1)
    assert counter.frame_count <= 2


@compiled
def test_the_check_leaves_no_guard():
    """The annotations are constants of the compiled program, and later calls do not compare them."""
    torch._dynamo.reset()

    def step(student, teacher, state):
        return (
            kdtorch.kl_loss(student, teacher)
            + kdtorch.dino_loss(student[None].repeat(2, 1, 1), teacher[None], state)[0]
        )

    x = torch.randn(3, 4)
    torch.compile(step, backend="eager", fullgraph=True)(x, x, kdtorch.dino_init(4))
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(step.__code__)
    guards = [line.split("#")[0] for line in str(entry.guard_manager).splitlines()]
    assert any("kl_loss" in guard for guard in guards)
    assert not any(word in guard for guard in guards for word in ("student_logits", "*batch", ".forms", ".arguments"))


@pytest.mark.slow
@both
@every_setting
def test_numbers_of_any_kind(f, loss, name):
    """Integers count as numbers, also those of NumPy and arrays, which may be traced; Booleans do not."""
    inputs = arguments(f, loss)
    whole = 1 if loss.ranges[name][1] <= 1 else 2
    want = f.numpy(evaluate(f, loss, inputs, **{name: float(whole)}))
    array = jnp.asarray if f is JAX else torch.tensor
    for number in (
        whole,
        np.int32(whole),
        np.float32(whole),
        array(whole),
        array(float(whole)),
        array(np.int16(whole)),
    ):
        assert f.numpy(evaluate(f, loss, inputs, **{name: number})) == pytest.approx(want, rel=1e-6), number
    absent = inspect.signature(getattr(f.kd, loss.name)).parameters[name].default is None
    for wrong in (True, np.True_, array(True), "2", *([] if absent else [None]), 2j, array([2.0])):
        with pytest.raises(
            TypeError, match=rf"^{loss.name}: `{name}` must be a number or a floating-point or integer array"
        ):
            evaluate(f, loss, inputs, **{name: wrong})
    if f is JAX:
        for number in (whole, float(whole)):
            traced = jax.jit(lambda x: evaluate(f, loss, inputs, **{name: x}))(number)
            assert float(traced) == pytest.approx(float(want), rel=1e-5)
        with pytest.raises(TypeError, match=rf"`{name}` must be .*, got bool\[\]"):
            jax.jit(lambda x: evaluate(f, loss, inputs, **{name: x}))(True)


@pytest.mark.slow
@every
def test_variables_of_flax_are_taken_for_their_arrays(loss):
    inputs = arguments(JAX, loss)
    options = {"where": jnp.arange(3) > 0} | {name: jnp.asarray(0.5) for name in settings(loss)}
    want = float(evaluate(JAX, loss, inputs, **options))

    def variable(x):
        return jax.tree.map(nnx.Param, x)

    assert evaluate(JAX, loss, variable(inputs), **variable(options)) == want
    first = loss.first

    @jax.jit
    @jax.value_and_grad
    def step(x, inputs, options):
        return evaluate(JAX, loss, {**inputs, first: x}, **options)

    traced, slope = step(variable(inputs[first]), variable(inputs), variable(options))
    assert float(traced) == pytest.approx(want, rel=1e-5)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (slope, step(inputs[first], inputs, options)[1]))))


def test_variables_in_a_state_give_arrays_back():
    views = jnp.ones((2, 3, 4))
    _, state = JAX.kd.dino_loss(views, views, JAX.kd.DINOState(nnx.BatchStat(jnp.zeros(4))))
    assert isinstance(state.center, jax.Array)


@both
def test_arrays_on_two_devices(f):
    x = f.array(np.ones((3, 4)))
    here, there = ("meta", "cpu") if f is TORCH else map(str, jax.devices()[:2])
    move = (lambda x, i: x.to((here, there)[i])) if f is TORCH else (lambda x, i: jax.device_put(x, jax.devices()[i]))
    labels = f.array(np.zeros(3, int))
    for name, given, wrong, other in (
        ("kl_loss", (move(x, 0), move(x, 1)), "teacher_logits", "student_logits"),
        ("dkd_loss", (move(x, 0), move(x, 0), move(labels, 1)), "labels", "student_logits"),
        ("hcl_loss", ([move(x[None, None], 0)], [move(x[None, None], 1)]), r"teacher_maps\[0\]", r"student_maps\[0\]"),
    ):
        message = (
            rf"^{name}: `{wrong}` must be on the device of `{other}`, {here}, got {there}; move both to one device$"
        )
        with pytest.raises(ValueError, match=message):
            getattr(f.kd, name)(*given)
    with pytest.raises(ValueError, match="`where` must be on the device of `student`"):
        f.kd.mse_loss(move(x, 0), move(x, 0), where=move(labels == 0, 1))


def test_a_state_and_a_number_are_brought_to_the_device():
    views = torch.ones((2, 3, 4), device="meta")
    loss, _ = kdtorch.dino_loss(views, views, kdtorch.dino_init(4), student_temperature=torch.tensor(0.1))
    assert loss.device.type == "meta"


@pytest.fixture
def none_warned(monkeypatch):
    monkeypatch.setattr(kdtorch._typing, "_warned", set())


CONSTANTS = [
    (loss, name)
    for loss in LOSSES
    for name, kind in loss.inputs.items()
    if loss.learns and name not in loss.learns and (kind == "distribution" or name in loss.constant)
]


@pytest.mark.usefixtures("none_warned")
@pytest.mark.parametrize(("loss", "name"), CONSTANTS, ids=[f"{loss.title}-{name}" for loss, name in CONSTANTS])
def test_a_constant_that_requires_a_gradient(loss, name):
    """It gives one warning if the first argument requires no gradient; a teacher that is trained too is common."""
    seed = itertools_seed()

    def inputs(*requiring):
        given = arguments(TORCH, loss, Sizes(batch=(3,), classes=seed, dim=seed))
        for key in requiring:
            for x in given[key] if isinstance(given[key], list) else [given[key]]:
                x.requires_grad_()
        return given

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(TORCH, loss, inputs(loss.learns[0], name))
        with torch.no_grad():
            evaluate(TORCH, loss, inputs(name))
        evaluate(TORCH, loss, {key: detached(x) for key, x in inputs(name).items()})
    text = (
        rf"^{loss.name}: `{name}` requires a gradient but gets none, because it is a constant of this loss, and `{loss.learns[0]}` "
        rf"requires none; swap the two arguments, use a loss that has this gradient, or give {name}.detach\(\)$"
    )
    with pytest.warns(UserWarning, match=text) as caught:
        evaluate(TORCH, loss, inputs(name))
    assert caught[0].filename == (calls.__file__ if loss.value == "array" else __file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(TORCH, loss, inputs(name))


def detached(x):
    return [y.detach() for y in x] if isinstance(x, list) else x.detach() if isinstance(x, torch.Tensor) else x


_seeds = iter(range(17, 400))


def itertools_seed():
    """A size that no earlier call had, so that the call is checked."""
    return next(_seeds)


@pytest.mark.usefixtures("none_warned")
def test_a_constant_under_transforms():
    x, y = torch.randn(2, 3, 4)
    with pytest.warns(UserWarning, match="kl_loss: `teacher_logits` requires a gradient"):
        torch.func.grad(kdtorch.kl_loss, argnums=1)(x, y)
    kdtorch._typing._warned.clear()
    with pytest.warns(UserWarning, match="kl_loss: `teacher_logits` requires a gradient"):
        torch.func.grad(lambda y: torch.func.vmap(kdtorch.kl_loss)(x, y).sum())(y)
    kdtorch._typing._warned.clear()
    torch.func.grad(kdtorch.kl_loss)(x, y)
    torch.func.grad(lambda x: torch.func.vmap(kdtorch.kl_loss)(x, y).sum())(x)


@compiled
@pytest.mark.usefixtures("none_warned")
def test_a_constant_under_a_compiler():
    x, y = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="mse_loss: `teacher` requires a gradient but gets none"):
        torch.compile(kdtorch.mse_loss, backend="eager", fullgraph=True)(x, y)


@pytest.mark.usefixtures("none_warned")
def test_what_the_second_argument_of_a_divergence_misses():
    """The Jensen-Shannon divergence from two KL divergences, as in the documentation of kl_loss."""
    s, t = torch.randn(2, 3, 4, dtype=torch.float64)

    def mixture(s):
        return torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1))

    def jsd(s):
        m = mixture(s)
        from_student = 2 * kdtorch.symmetric_kl_loss(s, m) - kdtorch.kl_loss(s, m)
        return (kdtorch.kl_loss(m.detach(), t) + from_student) / 2

    def plain(s):
        p, q = s.softmax(-1), t.softmax(-1)
        m = (p + q) / 2
        return ((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2).mean()

    def naive(s):
        return (kdtorch.kl_loss(mixture(s), t) + kdtorch.kl_loss(mixture(s), s)) / 2

    assert jsd(s).item() == pytest.approx(plain(s).item(), rel=1e-10)
    assert naive(s).item() == pytest.approx(plain(s).item(), rel=1e-10)
    slopes = [torch.func.grad(function)(s) for function in (jsd, plain, naive)]
    assert torch.allclose(*slopes[:2], rtol=1e-9)
    assert slopes[2].abs().max() < 1e-12


@every_setting
def test_a_setting_that_requires_a_gradient(loss, name):
    """Only temperatures that act on the student have a gradient; any other setting raises, also under transforms."""
    inputs = arguments(TORCH, loss)

    def value(x):
        return evaluate(TORCH, loss, inputs, **{name: x})

    number = torch.tensor(0.5, requires_grad=True)
    attempts = {
        "eager": lambda: value(number),
        "parameter": lambda: value(torch.nn.Parameter(torch.tensor(0.5))),
        "grad": lambda: torch.func.grad(value)(torch.tensor(0.5)),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(value))(torch.tensor([0.5, 0.6])),
        "grad of vmap": lambda: torch.func.grad(lambda x: torch.func.vmap(value)(x).sum())(torch.tensor([0.5, 0.6])),
    }
    if loss.learns and name in LEARNED:
        for title in ("eager", "parameter", "grad"):
            attempts[title]()
        return
    for attempt in attempts.values():
        with pytest.raises(ValueError, match=rf"^{loss.name}: `{name}` is a constant .* give {name}.detach\(\)$"):
            attempt()
    value(number.detach())
    with torch.no_grad():
        value(number)
    with pytest.raises(ValueError, match="is a constant"):
        value(number)


@compiled
@pytest.mark.parametrize(
    ("loss", "name"),
    [(loss, name) for loss, name in SETTINGS if name not in LEARNED],
    ids=lambda x: str(getattr(x, "name", x)),
)
def test_a_setting_that_requires_a_gradient_under_a_compiler(loss, name):
    inputs = arguments(TORCH, loss)

    def value(x):
        return evaluate(TORCH, loss, inputs, **{name: x})

    torch._dynamo.reset()
    for function, number in (
        (value, torch.tensor(0.5, requires_grad=True)),
        (torch.func.grad(value), torch.tensor(0.5)),
    ):
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=rf"{loss.name}: `{name}` is a constant .* give {name}.detach"
        ):
            torch.compile(function, backend="eager", fullgraph=True)(number)
