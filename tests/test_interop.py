"""Teachers, losses, states, weights and files that are used in the other framework."""

import contextlib
import copy
import errno
import functools
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from frameworks import BOTH, JAX, TORCH
from test_make_loss import ALL, CLASSES, configuration
from tiers import first, one_of_a_kind, slow

import kdjax
import kdjax.interop
import kdjax.nn
import kdtorch
import kdtorch.interop
import kdtorch.nn
from kdlosses.trees import each_leaf, leaves
from parity.calls import per_example
from parity.cases import LOSSES, MAPS, Sizes, draw
from parity.compare import ulps

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(kdjax.__file__).parent.parent
BRIDGES = {"jax": kdjax.interop, "torch": kdtorch.interop}
both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
NEEDS_64 = "and JAX has 32 bits; call jax.config.update"


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.unsafe_buffer_pointer()


def numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def normal(*shape, dtype="float32", seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# teachers


class Pair(NamedTuple):
    first: object
    second: object


class Echo(torch.nn.Module):
    """A module that returns its input, and what it was built with."""

    def __init__(self, function=lambda x: x):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int32", "bool"])
def test_a_torch_teacher_copies_nothing(dtype):
    x = normal(4, 6, 6, 3).astype(dtype)
    seen = []
    teacher = kdjax.interop.torch_teacher(Echo(lambda x: seen.append(x) or x), layout="NHWC")
    y = teacher(x)
    assert address(y) == address(seen[0]) == address(x)
    assert (seen[0].shape, y.shape, y.dtype) == ((4, 3, 6, 6), x.shape, x.dtype)
    assert np.array_equal(seen[0].permute(0, 2, 3, 1).float().numpy(), np.asarray(x.astype("float32")))
    assert np.array_equal(np.asarray(y), np.asarray(x))


def test_a_jax_teacher_copies_nothing():
    seen, x = [], torch.randn(4, 3, 6, 6)
    teacher = kdtorch.interop.jax_teacher(lambda params, x: {"y": x}, (), layout="NHWC", output=lambda x: x["y"])
    y = teacher(x)
    array = kdjax.interop.array("", x.movedim(1, -1))
    assert (address(array), array.shape) == (address(x), (4, 6, 6, 3))
    assert torch.equal(y, x)
    kept = []
    teacher = kdtorch.interop.jax_teacher(lambda params, x: seen.append(x.shape) or 2 * x, (), layout="NHWC")
    tensors = kdtorch.interop._tensors

    def noted(tree, place):
        kept.append(tree)
        return tensors(tree, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kdtorch.interop, "_tensors", noted)
        y = teacher(x)
    assert seen == [(4, 6, 6, 3)]
    assert address(y) == address(kept[0])
    assert torch.equal(y, 2 * x)


def test_layouts():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1).double()
    flax = nnx.Conv(3, 5, (3, 3), rngs=nnx.Rngs(0))
    nnx.update(flax, kdjax.interop.to_jax(conv))
    images = normal(2, 6, 7, 3, dtype="float64")
    want = np.asarray(flax(images))
    got = kdjax.interop.torch_teacher(conv, layout="NHWC")(images)
    assert ulps(np.asarray(got), want, "float64") <= 64
    tensor = torch.from_numpy(np.moveaxis(np.asarray(images), -1, 1).copy())
    back = kdtorch.interop.jax_teacher(flax, layout="NHWC")(tensor)
    assert ulps(back.permute(0, 2, 3, 1).numpy(), want, "float64") <= 64
    assert got.shape == (2, 6, 7, 5)
    assert back.shape == (2, 5, 6, 7)


def test_trees_and_keywords():
    module = Echo(lambda x, scale, more=None: {"a": [x["x"] * scale, None], "b": Pair(x["x"] + 1, more)})
    teacher = kdjax.interop.torch_teacher(module, inside_jit=True)
    x = normal(3, 2)
    for run in (teacher, jax.jit(teacher, static_argnums=1)):
        y = run({"x": x}, 2.0, more=jnp.arange(3))
        assert jax.tree.structure(y) == jax.tree.structure({"a": [0, None], "b": Pair(0, 0)})
        assert np.array_equal(y["a"][0], 2 * x)
        assert np.array_equal(y["b"].second, np.arange(3))
    theirs = kdtorch.interop.jax_teacher(lambda p, x, more: {"a": [x["x"] * p, None], "b": Pair(x["x"], more)}, 2.0)
    y = theirs({"x": torch.ones(3)}, more=torch.arange(3))
    assert y["a"][1] is None
    assert isinstance(y["b"], Pair)
    assert y["b"].second.tolist() == [0, 1, 2]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)
    ).double()


def flax_network():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Linear(6, 8, rngs=rngs),
        nnx.BatchNorm(8, epsilon=1e-5, rngs=rngs),
        nnx.relu,
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(8, 4, rngs=rngs),
    )
    nnx.update(net, kdjax.interop.to_jax(network()))
    return net


@slow
def test_inside_jit_a_teacher_is_a_constant():
    module = network()
    teacher = kdjax.interop.torch_teacher(module, inside_jit=True)
    x = normal(5, 6, dtype="float64")
    want = module.eval()(torch.from_numpy(np.array(x))).detach().numpy()

    def loss(x):
        return kdjax.kl_loss(2 * x[:, :4], teacher(x))

    assert np.array_equal(jax.jit(teacher)(x), want)
    assert np.allclose(jax.vmap(teacher)(x[:, None])[:, 0], want, rtol=1e-12)
    value, slope = jax.jit(jax.value_and_grad(loss))(x)
    assert np.allclose(value, loss(x), rtol=1e-14)
    outside = jax.grad(lambda x: kdjax.kl_loss(2 * x[:, :4], jnp.asarray(want)))(x)
    assert np.allclose(slope, outside, rtol=1e-12)
    assert np.allclose(jax.lax.scan(lambda c, x: (c, teacher(x)), 0, x[:, None])[1][:, 0], want, rtol=1e-12)


def test_a_torch_teacher_is_put_into_eval_and_back():
    module = network().train()
    module[3].eval()
    before = copy.deepcopy(module.state_dict())
    teacher = kdjax.interop.torch_teacher(module)
    x = normal(5, 6, dtype="float64")
    assert np.array_equal(teacher(x), teacher(x))
    modes = [part.training for part in module.modules()]
    assert modes == [True, True, True, True, False, True]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        teacher(x[:, :3])
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(x, before[k]) for k, x in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())
    module[0].weight.data.zero_()  # the module as it is, not as it was
    module[0].bias.data.zero_()
    assert np.ptp(np.asarray(teacher(x)), axis=0).max() == 0


def test_a_jax_teacher_is_put_into_eval_and_back():
    module = flax_network()
    module.train()
    x = torch.from_numpy(np.array(normal(5, 6, dtype="float64")))
    teacher = kdtorch.interop.jax_teacher(module)
    want = network().eval()(x).detach()
    assert ulps(teacher(x).numpy(), want.numpy(), "float64") <= 64
    before = jax.tree.map(np.asarray, nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))
    with pytest.raises(TypeError, match="dot_general"):
        teacher(x[:, :3])
    assert (module.layers[1].use_running_average, module.layers[3].deterministic) == (False, False)
    after = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), before, jax.tree.map(np.asarray, after)))
    module.layers[4].kernel[...] = jnp.zeros((8, 4), "float64")  # the module as it is, not as it was
    assert np.ptp(teacher(x).numpy(), axis=0).max() == 0


def test_apply_with_parameters():
    teacher = kdtorch.interop.jax_teacher(lambda params, x: x @ params["w"], {"w": jnp.ones((3, 2))})
    assert teacher(torch.ones(4, 3, dtype=torch.float64)).tolist() == [[3.0, 3.0]] * 4


def torch_teacher(function, **options):
    return kdjax.interop.torch_teacher(Echo(function), **options)


def jax_teacher(function, **options):
    return kdtorch.interop.jax_teacher(lambda _, x: function(x), (), **options)


X, T = jnp.ones((2, 3)), torch.ones(2, 3)
MISTAKES = {
    "no module": (
        lambda: kdjax.interop.torch_teacher(abs),
        TypeError,
        "torch_teacher: `module` must be a torch.nn.Module, got builtin_function_or_method",
    ),
    "no parameters": (
        lambda: kdtorch.interop.jax_teacher(abs),
        TypeError,
        "jax_teacher: `fn` must be an nnx.Module, or a function together with `params`, got builtin.* and None",
    ),
    "parameters and module": (
        lambda: kdtorch.interop.jax_teacher(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {}),
        TypeError,
        "`fn` must be an nnx.Module, or .*, got both",
    ),
    "layout of torch_teacher": (
        lambda: torch_teacher(abs, layout="NCHW"),
        ValueError,
        'torch_teacher: `layout` must be None, "NWC", "NHWC" or "NDHWC", got \'NCHW\'',
    ),
    "layout of jax_teacher": (lambda: jax_teacher(abs, layout="CHW"), ValueError, "jax_teacher: `layout` must be None"),
    "an object for an output, in torch": (
        lambda: torch_teacher(lambda x: object())(X),
        TypeError,
        "torch_teacher: the output must be an array or a tree of arrays, got object; return the part that you want, or "
        "select it with `output=`",
    ),
    "an object in an output, in torch": (
        lambda: torch_teacher(lambda x: {"logits": x, "name": "net"})(X),
        TypeError,
        "torch_teacher: the output `name` must be an array or a tree of arrays, got str",
    ),
    "an object for an output, in jax": (
        lambda: jax_teacher(lambda x: object())(T),
        TypeError,
        "jax_teacher: the output must be an array or a tree of arrays, got object",
    ),
    "nothing for an output": (
        lambda: torch_teacher(lambda x: None)(X),
        TypeError,
        "the output must be .* got NoneType",
    ),
    "under jit": (
        lambda: jax.jit(torch_teacher(lambda x: x))(X),
        ValueError,
        "torch_teacher: called under jit, .* or create it with inside_jit=True",
    ),
    "a dtype in, that DLPack has not": (
        lambda: torch_teacher(lambda x: x)(jnp.ones(3, "int4")),
        TypeError,
        r"torch_teacher: an array of dtype int4 cannot be converted to PyTorch, .*; cast it first, as by x.astype\(jnp",
    ),
    "a key": (lambda: torch_teacher(lambda x: x)(jax.random.key(0)), TypeError, "an array of dtype key<fry> cannot be"),
    "a dtype out, that DLPack has not": (
        lambda: torch_teacher(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8))(X),
        TypeError,
        r"torch_teacher: a tensor of dtype torch.quint8 cannot be converted to JAX, .* as by x.float\(\)",
    ),
    "a tensor that requires gradient": (
        lambda: jax_teacher(lambda x: x)(T.clone().requires_grad_()),
        ValueError,
        r"jax_teacher: the tensor of shape \[2, 3\] at `\[0\]\[0\]` requires a gradient, but no gradient flows through a teacher; "
        r"give x.detach\(\), or call the teacher under torch.no_grad\(\)",
    ),
    "a module that writes into its input": (
        lambda: torch_teacher(lambda x: x.add_(1))(X + 0),
        RuntimeError,
        r"torch_teacher: the module wrote into its input, .* \(inplace=False\)",
    ),
    "a loss of integers": (
        lambda: kdtorch.interop.jax_loss(lambda x: x.argmax())(T),
        TypeError,
        r"jax_loss: the loss must be floating-point, got int64\[\]; return what is not differentiated after it",
    ),
    "a loss of words, in jax": (
        lambda: kdtorch.interop.jax_loss(lambda x: "small")(T),
        TypeError,
        "jax_loss: the output must be an array or a tree of arrays, got str",
    ),
    "a loss of words, in torch": (
        lambda: kdjax.interop.torch_loss(lambda x: "small")(X),
        TypeError,
        "torch_loss: the output must be an array or a tree of arrays, got str",
    ),
    "a tensor of a graph that crosses": (
        lambda: kdtorch.interop.to_jax({"x": [T.clone().requires_grad_()]}),
        ValueError,
        r"`x.0` requires a gradient, but no gradient flows through this function; give x.detach\(\)",
    ),
    "a set that crosses": (
        lambda: kdjax.interop.to_torch({"x": {1, 2}}),
        TypeError,
        "`x` is a set, which cannot be converted; supported are arrays, numbers, strings, states and modules of this library",
    ),
    "a named tuple that crosses": (lambda: kdjax.interop.to_torch(Pair(X, X)), TypeError, "`tree` is a Pair, which"),
    "keys that are no strings": (
        lambda: kdtorch.interop.to_jax({"x": {3: T}}),
        TypeError,
        "`x` must have strings as keys, got 3",
    ),
    "a function that is not ours": (
        lambda: kdjax.interop.to_torch(kdjax.nn.FunctionLoss(network)),
        TypeError,
        "`function` is a function, which cannot be converted",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*")
@pytest.mark.filterwarnings("ignore:.*quint8.*")
def test_mistakes(mistake):
    run, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        run()


def test_64_bits_are_not_cut_in_silence(tmp_path):
    double = torch.ones(2, dtype=torch.float64)
    kdtorch.interop.save(tmp_path / "double", {"x": [double]})
    with jax.enable_x64(False):
        for run in (
            lambda: torch_teacher(lambda x: x.double())(X.astype("float32")),
            lambda: jax.jit(torch_teacher(lambda x: x.double(), inside_jit=True))(X.astype("float32")),
            lambda: jax_teacher(lambda x: x)(double),
            lambda: kdtorch.interop.jax_loss(jnp.sum)(double),
            lambda: kdtorch.interop.to_jax(double),
            lambda: kdjax.interop.load(tmp_path / "double"),
            lambda: kdtorch.interop.to_jax(torch.tensor([2**40])),
        ):
            with pytest.raises(ValueError, match=NEEDS_64):
                run()
        assert kdtorch.interop.to_jax(torch.tensor([7])).dtype == "int32"
        assert torch_teacher(lambda x: x.argmax())(X.astype("float32")).dtype == "int32"


# losses


def in_torch(loss, function, inputs):
    """The value, the gradients of all inputs that may have one, and the state."""
    given = TORCH.arrays(inputs)
    for x in leaves({k: given[k] for k in loss.learns + loss.constant}).values():
        x.requires_grad_()
    if loss.state:
        given["state"] = getattr(kdtorch, loss.inputs["state"])(**given["state"])
    value, state = function(*given.values()) if loss.state else (function(*given.values()), ())
    if value.requires_grad:
        value.backward()
    return value, {k: each_leaf(lambda x: x.grad, given[k]) for k in loss.learns + loss.constant}, state


def in_jax(loss, function, inputs):
    given = JAX.arrays(inputs)
    if loss.state:
        given["state"] = getattr(kdjax, loss.inputs["state"])(**given["state"])

    def call(free):
        result = function(*{**given, **free}.values())
        return result if loss.state else (result, ())

    free = {k: given[k] for k in loss.learns + loss.constant}
    (value, state), slopes = jax.jit(jax.value_and_grad(call, has_aux=True))(free)
    return value, slopes, state


@pytest.mark.parametrize("loss", one_of_a_kind(x for x in LOSSES if x.learns), ids=lambda loss: loss.title)
@pytest.mark.parametrize("name", ["jax_loss", "torch_loss"])
def test_every_loss_crosses(name, loss):
    """A loss of one package, called from the other, gives the same value, gradients and state as kdtorch."""
    (inputs,) = draw(loss, Sizes(), 0)
    options = {"channel_axis": 1} if MAPS & set(loss.inputs.values()) else {}
    theirs = functools.partial(per_example(kdtorch, loss), **options)
    value, slopes, state = in_torch(loss, theirs, inputs)
    if name == "jax_loss":
        ours = functools.partial(per_example(kdjax, loss), **options)
        got, got_slopes, got_state = in_torch(loss, kdtorch.interop.jax_loss(ours), inputs)
        assert type(got_state) is type(state)
    else:
        got, got_slopes, got_state = in_jax(loss, kdjax.interop.torch_loss(theirs), inputs)
        assert type(got_state).__name__ == type(state).__name__
        assert type(got_state).__module__.startswith("kdjax.") or not loss.state
    assert ulps(numpy(got), numpy(value), "float64") <= 64
    for place, slope in leaves(slopes).items():
        slope = np.zeros_like(numpy(leaves(got_slopes)[place])) if slope is None else numpy(slope)
        assert ulps(numpy(leaves(got_slopes)[place]), slope, "float64") <= 4096, place
    for a, b in zip(state, got_state, strict=True):
        assert ulps(numpy(b), numpy(a), "float64") <= 64


def test_a_users_own_loss_in_torch():
    """A function of trees that returns a tree of losses and extras, with some inputs that need a gradient."""

    def ours(tree, scale, labels, *, power):
        rows = jnp.arange(len(labels))
        losses = {"a": (tree["x"][rows, labels] ** power).sum() * scale, "b": jnp.abs(tree["y"]).mean()}
        return losses, {"count": labels.sum(), "scale": scale * 2}

    loss = kdtorch.interop.jax_loss(ours)
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    scale, labels = torch.tensor(3.0, requires_grad=True), torch.tensor([0, 2, 1, 1])
    losses, extras = loss({"x": x, "y": y}, scale, labels, power=3)
    (losses["a"] + 2 * losses["b"]).backward()
    got = [v.grad.clone() for v in (x, y, scale)]
    want = torch.autograd.grad((x[torch.arange(4), labels] ** 3).sum() * scale + 2 * y.abs().mean(), (x, y, scale))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    assert extras["count"].item() == 4
    assert not extras["scale"].requires_grad
    with torch.no_grad():
        again, _ = loss({"x": x, "y": y}, scale, labels, power=3)
    assert torch.equal(again["a"], losses["a"].detach())


def test_a_users_own_loss_in_jax():
    def theirs(tree, scale, labels, *, power):
        losses = {"a": (tree["x"].gather(1, labels[:, None]) ** power).sum() * scale, "b": tree["y"].abs().mean()}
        return losses, {"count": labels.sum(), "scale": scale * 2}

    loss = kdjax.interop.torch_loss(theirs)
    tree, scale, labels = {"x": normal(4, 3), "y": normal(5)}, jnp.float32(3), jnp.array([0, 2, 1, 1])

    def total(tree, scale):
        losses, extras = loss(tree, scale, labels, power=3)
        return losses["a"] + 2 * losses["b"] + extras["scale"], extras

    def want(tree, scale):
        return (tree["x"][jnp.arange(4), labels] ** 3).sum() * scale + 2 * jnp.abs(tree["y"]).mean()

    (_, extras), slopes = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(tree, scale)
    expected = jax.grad(want, (0, 1))(tree, scale)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), slopes, expected))
    assert (extras["count"], extras["scale"]) == (4, 6)
    single = jax.vmap(jax.grad(lambda x: loss({"x": x[None], "y": x}, scale, labels[:1], power=3)[0]["a"]))(tree["x"])
    assert np.allclose(single, jax.vmap(jax.grad(lambda x: 3 * x[0] ** 3))(tree["x"]), rtol=1e-5)


def test_second_derivatives_are_refused():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (slope,) = torch.autograd.grad(kdtorch.interop.jax_loss(lambda x: (x**3).sum())(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; kdjax has it"):
        (slope + x).sum().backward()
    cube = kdjax.interop.torch_loss(lambda x: (x**3).sum())
    with pytest.raises(ValueError, match="Pure callbacks do not support JVP"):
        jax.grad(lambda x: jax.grad(cube)(x).sum())(X)


@pytest.mark.parametrize("which", [0, 1])
def test_what_was_written_into_has_no_gradient(which):
    """The backward pass reads the memory of the tensors, so it raises an error if they were changed."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    inputs = [x * 1, torch.tensor([3.0, 4.0])]
    value = kdtorch.interop.jax_loss(lambda x, y: (x**3 * y).sum())(*inputs)
    with torch.no_grad():
        inputs[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_teacher_waits_for_its_input():
    """JAX returns an array before it is computed."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: jnp.cos(x @ x.T / 300), x))
    x = slow(jnp.ones((300, 300), "float32"))
    y = torch_teacher(lambda x: x.clone())(x)
    assert np.array_equal(np.asarray(y), np.asarray(x))
    assert np.asarray(x).any()


def test_no_gradient_where_none_can_flow():
    loss = kdjax.interop.torch_loss(lambda x: x.detach().sum())
    assert loss(X) == 6
    with pytest.raises(
        ValueError, match=r"torch_loss: a gradient is requested, but none can flow: .* do not detach it"
    ):
        jax.grad(loss)(X)


def test_a_foreign_loss_is_compiled_once():
    traces = []
    loss = kdtorch.interop.jax_loss(lambda x, power: traces.append(1) or (x**power).sum())
    for _ in range(3):
        loss(torch.ones(3, requires_grad=True), power=2).backward()
    assert len(traces) == 1
    runs = []
    loss = jax.jit(kdjax.interop.torch_loss(lambda x: runs.append(1) or x.sum()))
    for _ in range(3):
        loss(X).block_until_ready()
    assert len(runs) == 4  # the first run is on zeros


# states and weights

RNG = np.random.default_rng(0)
STEPS = 20


def ours(name, **arguments):
    rngs = {} if name in ("DINOLoss", "IBOTLoss") else {"rngs": nnx.Rngs(0)}
    return getattr(kdjax.nn, name)(**arguments, **rngs)


MODULES = {
    "dino": lambda: ours("DINOLoss", dim=4, views=3, student_temperature=0.3),
    "ibot": lambda: ours("IBOTLoss", dim=4, student_temperature=0.3),
    "dcn": lambda: ours("DynamicCenterNormLoss", num_classes=5, dim=4),
    "uskd": lambda: ours("USKDLoss", feature_dim=6, num_classes=5, beta=0.3),
    "crcd": lambda: ours("CRCDLoss", student_dim=5, teacher_dim=6, dim=4, num_data=9, num_negatives=7, momentum=0.3),
    "crcd, deep": lambda: ours("CRCDLoss", student_dim=5, teacher_dim=6, dim=4, num_data=9, embed="nonlinear"),
    "crcd, bare": lambda: ours("CRCDLoss", student_dim=4, teacher_dim=4, dim=4, num_data=9, embed="none"),
    "crd": lambda: ours("CRDLoss", student_dim=5, teacher_dim=6, dim=4, num_data=9, num_negatives=7, temperature=0.3),
    "crd, bare": lambda: ours("CRDLoss", student_dim=4, teacher_dim=4, dim=4, num_data=9, embed="none"),
    "abf": lambda: ours("ABF", in_channels=3, mid_channels=4, out_channels=5, fuse=True),
    "review": lambda: ours("ReviewKD", in_channels=[3, 4], out_channels=[5, 7], mid_channels=6),
    "abf, resized": lambda: ours("ABF", in_channels=3, mid_channels=4, out_channels=5, fuse=True, out_shapes=7),
    "review, resized": lambda: ours(
        "ReviewKD", in_channels=[3, 4], out_channels=[5, 7], mid_channels=6, out_shapes=[7, (3, 2)]
    ),
    "vid": lambda: ours("VIDLoss", in_channels=3, mid_channels=6, out_channels=5, initial_variance=2.0, eps=1e-3),
    "projector": lambda: ours("Projector", in_channels=3, out_channels=5),
    "projector, normalised": lambda: ours("Projector", in_channels=3, out_channels=5, batch_norm=True),
    "mixture": lambda: kdjax.make_loss(
        configuration(ALL, KD_LOSS_ARGS={"dkd": {"beta": 3.0}}), CLASSES, 20, conventions="founding"
    ),
}


def flat(module):
    """The weights of a module of either framework by their names, without keys and generators."""
    if isinstance(module, torch.nn.Module):
        return {k: numpy(x) for k, x in module.state_dict().items()}
    flat = nnx.to_flat_state(nnx.state(module))
    values = {".".join(map(str, path)): x[...] for path, x in flat}
    return {k: np.asarray(x) for k, x in values.items() if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert np.array_equal(a[name], b[name]), name


def settings(module):
    """The arguments that a module was built with, without arrays."""
    plain = (int, float, str, bool, tuple)
    own = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k[0] != "_" and k != "training"}
    return {k: v for k, v in own.items() if k not in ("use_running_average", "reads")}


@pytest.mark.parametrize(("name", "dtype"), first(2, [*((name, "float64") for name in MODULES), ("crcd", "float32")]))
def test_modules_cross_and_come_back(name, dtype, tmp_path):
    module = MODULES[name]()
    floats = nnx.state(module, lambda path, x: jnp.issubdtype(x[...].dtype, jnp.floating))
    nnx.update(module, jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), dtype), floats))
    theirs = kdjax.interop.to_torch(module)
    assert type(theirs).__name__ == type(module).__name__
    assert type(theirs).__module__.startswith("kdtorch.nn.")
    assert {str(x.dtype) for x in theirs.parameters()} <= {f"torch.{dtype}"}
    assert all(x.requires_grad for x in theirs.parameters())
    back = kdjax.interop.to_jax(theirs)
    same(flat(back), flat(module))
    assert settings(back) == settings(module) == settings(theirs)

    kdjax.interop.save(tmp_path / "ours", module)
    kdtorch.interop.save(tmp_path / "theirs", theirs)
    same(flat(kdjax.interop.load(tmp_path / "ours")), flat(module))
    same(flat(kdjax.interop.load(tmp_path / "theirs")), flat(module))
    same(flat(kdtorch.interop.load(tmp_path / "ours")), flat(theirs))
    same(flat(kdtorch.interop.load(tmp_path / "theirs")), flat(theirs))

    twin = copy.deepcopy(theirs)
    twin.load_state_dict(kdtorch.interop.load(tmp_path / "theirs").state_dict())
    same(flat(twin), flat(theirs))


@pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
def test_the_mode_crosses(f):
    for mode in ("train", "eval"):
        module = kdjax.nn.ReviewKD([3], [4], 5, rngs=nnx.Rngs(0))
        getattr(module, mode)()
        theirs = kdjax.interop.to_torch(module)
        assert theirs.training == (mode == "train")
        back = kdjax.interop.to_jax(theirs)
        assert back.connectors[0].norm1.use_running_average == (mode == "eval")


def test_what_draws_goes_on_in_its_own_framework_and_starts_anew_in_the_other(tmp_path):
    module = MODULES["crcd"]()
    kdjax.interop.save(tmp_path / "file", module)
    kept = kdjax.interop.load(tmp_path / "file")
    assert np.array_equal(jax.random.key_data(kept.key[...]), jax.random.key_data(module.key[...]))
    draws = [kdtorch.interop.load(tmp_path / "file").generator for _ in range(2)]
    assert torch.equal(*(torch.rand(4, generator=x) for x in draws))

    theirs = kdjax.interop.to_torch(module)
    torch.rand(3, generator=theirs.generator)
    kdtorch.interop.save(tmp_path / "file", theirs)
    kept = kdtorch.interop.load(tmp_path / "file")
    assert torch.equal(torch.rand(4, generator=kept.generator), torch.rand(4, generator=theirs.generator))
    assert kdjax.interop.load(tmp_path / "file").key[...].shape == ()
    assert kdjax.interop.to_torch(kdjax.interop.to_jax(kdtorch.nn.CRCDLoss(4, 4, 4, 9))).generator is not None


def test_a_key_of_another_kind_is_kept(tmp_path):
    module = kdjax.nn.CRCDLoss(4, 4, 4, 9, rngs=nnx.Rngs(jax.random.key(3, impl="rbg")))
    kdjax.interop.save(tmp_path / "file", module)
    kept = kdjax.interop.load(tmp_path / "file").key[...]
    assert kept.dtype == module.key[...].dtype
    assert np.array_equal(jax.random.key_data(kept), jax.random.key_data(module.key[...]))


DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_trees_cross_and_come_back(dtype, tmp_path):
    x = jnp.asarray(RNG.integers(0, 2, size=(3, 4)), "float32").astype(dtype)
    tree = {
        "x": x,
        "deep": [{"empty": x[:0], "scalar": x[0, 0]}, (1, 2.5, None, "word", True)],
        "state": kdjax.DINOState(normal(3)),
        "array": {"dtype": normal(2), "module": "name", "state": x},
    }
    theirs = kdjax.interop.to_torch(tree)
    assert str(theirs["x"].dtype) == f"torch.{dtype}"
    assert type(theirs["state"]) is kdtorch.DINOState
    assert theirs["deep"][1] == (1, 2.5, None, "word", True)
    kdjax.interop.save(tmp_path / "ours", tree)
    kdtorch.interop.save(tmp_path / "theirs", theirs)
    for back in (
        kdjax.interop.to_jax(theirs),
        kdjax.interop.load(tmp_path / "ours"),
        kdjax.interop.load(tmp_path / "theirs"),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for a, b in zip(leaves(back).values(), leaves(tree).values(), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
            assert not isinstance(b, jax.Array) or a.dtype == b.dtype


def test_copies_are_copies():
    state = kdtorch.dino_init(3)
    crossed = kdtorch.interop.to_jax(state)
    state.center.add_(1)
    assert not crossed.center.any()
    back = kdtorch.interop.to_torch(crossed)
    back.center.add_(1)
    assert not crossed.center.any()


class Student(nnx.Module):
    """A student of another library, with a loss of this one inside."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 5, rngs=rngs))
        self.embed, self.scale = nnx.Embed(7, 4, rngs=rngs), nnx.Param(jnp.ones((), "float32"))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.loss = kdjax.nn.DINOLoss(5)


class Port(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5))
        self.embed, self.scale = torch.nn.Embedding(7, 4), torch.nn.Parameter(torch.zeros(()))
        self.loss = kdtorch.nn.DINOLoss(5)


def test_weights_of_a_module_that_is_not_ours(tmp_path):
    student, port = Student(), Port()
    weights = kdjax.interop.to_torch(student)
    port.load_state_dict(weights)
    assert np.array_equal(numpy(port.conv.weight), np.asarray(student.conv.kernel[...]).transpose(3, 2, 0, 1))
    assert np.array_equal(numpy(port.head[2].weight), np.asarray(student.head.layers[2].kernel[...]).T)
    before = flat(student)
    blank = Student()
    for path in (None, tmp_path / "ours", tmp_path / "theirs"):
        nnx.update(blank, jax.tree.map(jnp.zeros_like, nnx.state(blank, nnx.Not(nnx.RngState))))
        if path is None:
            nnx.update(blank, kdjax.interop.to_jax(port))
        else:
            (kdjax.interop if path.name == "ours" else kdtorch.interop).save(
                path, student if path.name == "ours" else port
            )
            nnx.update(blank, kdjax.interop.load(path))
        same(flat(blank), before)
    port.load_state_dict(kdtorch.interop.load(tmp_path / "theirs"))


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("window", [(3,), (3, 2), (2, 3, 4)])
def test_transposed_convolutions_cross(window, transpose_kernel):
    options = {"padding": "VALID", "transpose_kernel": transpose_kernel, "param_dtype": "float64"}
    ours = nnx.ConvTranspose(3, 5, window, 2, **options, rngs=nnx.Rngs(0))
    theirs = getattr(torch.nn, f"ConvTranspose{len(window)}d")(3, 5, window, 2).double()
    theirs.load_state_dict(kdjax.interop.to_torch(ours))
    x = normal(2, *(4, 5, 6)[: len(window)], 3, dtype="float64")
    with torch.no_grad():
        y = theirs(torch.from_numpy(np.array(x)).movedim(-1, 1)).movedim(1, -1)
    np.testing.assert_allclose(numpy(y), ours(x), rtol=1e-12, atol=1e-12)
    if not transpose_kernel:  # that is how PyTorch's is read
        same(flat(kdjax.interop.to_jax(theirs)), flat(ours))


def test_attention_does_not_come_back():
    with pytest.raises(TypeError, match="multi-head attention does not say"):
        kdjax.interop.to_jax(torch.nn.MultiheadAttention(4, 2))


# a training that continues in the other framework

B, WIDTH = 6, 8 + CLASSES + 10
NEGATIVES = RNG.integers(20, size=(B, 16))
MIXTURES = ["kd-dino-dcn-crcd", "kd-uskd-rkd-dkd-mse", "kd-eu_mse-diff-uskd_tea-skld"]


def parts(y):
    """The outputs of a student, by the names of `feat`."""
    return {"stu": y[:, :8], "score_stu": y[:, 8 : 8 + CLASSES], "fea_stu": y[:, 8 + CLASSES :]}


def mixed(student, loss, b):
    return loss(feat={**b, **parts(student(b["x"])), "feats_tea": b["feats_mid"]}, target=b["target"], epoch=b["epoch"])


RUNS = {
    "dino": (
        lambda: ours("DINOLoss", dim=8, warmup_temperature=0.02, warmup_epochs=9),
        lambda student, loss, b: loss(parts(student(b["x"]))["stu"], b["tea"], b["epoch"]),
    ),
    "ibot": (
        lambda: ours("IBOTLoss", dim=4, warmup_temperature=0.02, warmup_epochs=9),
        lambda student, loss, b: loss(
            *(x.reshape(-1, 2, 4) for x in (parts(student(b["x"]))["stu"], b["tea"])),
            (b["tea"] > 0).reshape(-1, 2, 4)[:, :, 0],
            b["epoch"],
        ),
    ),
    "dcn": (
        lambda: ours("DynamicCenterNormLoss", num_classes=CLASSES, dim=8),
        lambda student, loss, b: loss(parts(student(b["x"]))["stu"], b["tea"], b["target"]),
    ),
    "uskd": (
        lambda: ours("USKDLoss", feature_dim=10, num_classes=CLASSES),
        lambda student, loss, b: loss(*(parts(student(b["x"]))[k] for k in ("fea_stu", "score_stu")), b["target"]),
    ),
    "crcd": (
        lambda: ours("CRCDLoss", student_dim=8, teacher_dim=8, dim=4, num_data=20, embed="nonlinear"),
        lambda student, loss, b: loss(parts(student(b["x"]))["stu"], b["tea"], b["index"], b["negatives"]),
    ),
    "crd": (
        lambda: ours("CRDLoss", student_dim=8, teacher_dim=8, dim=4, num_data=20),
        lambda student, loss, b: loss(parts(student(b["x"]))["stu"], b["tea"], b["index"], b["negatives"]),
    ),
    "review": (
        lambda: ours("ReviewKD", in_channels=[3, 4], out_channels=[5, 7], mid_channels=6),
        lambda student, loss, b: package(loss).hcl_loss(loss(b["feats_stu"]), b["feats_tea"]) + student(b["x"]).mean(),
    ),
    "vid": (
        lambda: ours("VIDLoss", in_channels=4, mid_channels=6, out_channels=7),
        lambda student, loss, b: loss(b["feats_stu"][1], b["feats_tea"][1]) + student(b["x"]).mean(),
    ),
    "projector": (
        lambda: ours("Projector", in_channels=4, out_channels=7, batch_norm=True),
        lambda student, loss, b: ((loss(b["feats_stu"][1]) - b["feats_tea"][1]) ** 2).mean() + student(b["x"]).mean(),
    ),
    **{names: (lambda names=names: kdjax.make_loss(configuration(names), CLASSES, 20), mixed) for names in MIXTURES},
}


def package(module):
    return kdtorch if isinstance(module, torch.nn.Module) else kdjax


def batches():
    """The batches of all steps in NumPy, with channels-first maps."""
    result = []
    for step in range(2 * STEPS):
        rng = np.random.default_rng(step)
        shapes = {"x": (B, 6), "tea": (B, 8), "score_tea": (B, CLASSES), "fea_tea": (B, 10)}
        batch = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        batch |= {"target": rng.integers(CLASSES, size=B), "index": rng.choice(20, B, replace=False)}
        batch |= {"negatives": NEGATIVES, "epoch": np.array(step)}
        for side, channels in (("stu", (3, 4)), ("tea", (5, 7)), ("mid", (3, 4))):
            batch[f"feats_{side}"] = [rng.normal(size=(B, c, n, n)) for c, n in zip(channels, (6, 3), strict=True)]
        result.append(batch)
    return result


def jax_step(call):
    @functools.partial(jax.jit, static_argnums=0)
    def step(graph, params, state, speeds, batch):
        def objective(params):
            both = nnx.merge(graph, params, state, copy=True)
            return call(both.student, both.loss, batch), nnx.state(both, nnx.Not(nnx.Param))

        (value, state), slopes = jax.value_and_grad(objective, has_aux=True)(params)
        speeds = jax.tree.map(lambda v, g: 0.9 * v + g, speeds, slopes)
        return jax.tree.map(lambda p, v: p - 0.003 * v, params, speeds), state, speeds, value

    return step


def go_on_in_jax(step, student, loss, speeds, batches):
    """Continue SGD with momentum; the velocities are stored as the weights of a student and a loss."""
    both, moving = nnx.Dict(student=student, loss=loss), nnx.Dict(**speeds)
    graph, params, state = nnx.split(both, nnx.Param, ...)
    speed, values = nnx.state(moving, nnx.Param), []
    for batch in batches:
        turned = {k: [np.moveaxis(x, 1, -1) for x in v] if "feats" in k else v for k, v in batch.items()}
        with jax.numpy_dtype_promotion("standard"):  # Flax's batch norm needs it
            params, state, speed, value = step(graph, params, state, speed, JAX.arrays(turned))
        values.append(float(value))
    nnx.update(both, params, state)
    nnx.update(moving, speed)
    return values


def go_on_in_torch(call, student, loss, speeds, batches):
    learns = [*student.parameters(), *loss.parameters()]
    speed, values = [*speeds["student"].parameters(), *speeds["loss"].parameters()], []
    for batch in batches:
        value = call(student, loss, TORCH.arrays(batch))
        slopes = torch.autograd.grad(value, learns, allow_unused=True)
        with torch.no_grad():
            for p, v, g in zip(learns, speed, slopes, strict=True):
                v.mul_(0.9).add_(0 if g is None else g)
                p.sub_(0.003 * v)
        values.append(value.item())
    return values


def blank(f):
    return nnx.Linear(6, WIDTH, rngs=nnx.Rngs(0)) if f is JAX else torch.nn.Linear(6, WIDTH).double()


def across(to, path, run):
    """Pass the student, the loss and their velocities through a file."""
    other = TORCH if to is JAX else JAX
    BRIDGES[other.name].save(path, run)
    loaded = BRIDGES[to.name].load(path)

    def put(weights):
        student = blank(to)
        nnx.update(student, weights) if to is JAX else student.load_state_dict(weights)
        return student

    speeds = {"student": put(loaded["speeds"]["student"]), "loss": loaded["speeds"]["loss"]}
    return {"student": put(loaded["student"]), "loss": loaded["loss"], "speeds": speeds}


@pytest.mark.parametrize("name", first(2, RUNS))
def test_a_run_goes_on_in_the_other_framework(name, tmp_path, monkeypatch):
    make, call = RUNS[name]
    monkeypatch.setattr(kdjax.nn._contrast, "crcd_negatives", lambda *_: jnp.asarray(NEGATIVES, "int32"))
    monkeypatch.setattr(kdtorch.nn._contrast, "crcd_negatives", lambda *_: torch.from_numpy(NEGATIVES))
    step, data = jax_step(call), batches()

    def start():
        student, loss = blank(JAX), make()
        rng = np.random.default_rng(0)
        for module in (student, loss):
            for _, x in nnx.to_flat_state(nnx.state(module, nnx.Param)):
                x.set_value(jnp.asarray(0.3 * rng.normal(size=x.shape), "float64"))
            floats = nnx.state(module, lambda path, x: getattr(x[...], "dtype", None) == "float32")
            nnx.update(module, jax.tree.map(lambda x: x.astype("float64"), floats))
        speeds = {"student": nnx.clone(student), "loss": nnx.clone(loss)}
        for module in speeds.values():
            nnx.update(module, jax.tree.map(jnp.zeros_like, nnx.state(module, nnx.Param)))
        return {"student": student, "loss": loss, "speeds": speeds}

    stayed, went = start(), start()
    want = go_on_in_jax(step, **stayed, batches=data)
    got = go_on_in_jax(step, **went, batches=data[:STEPS])
    went = across(TORCH, tmp_path / "there", went)
    got += go_on_in_torch(call, **went, batches=data[STEPS:])
    back = across(TORCH, tmp_path / "from the start", start())
    other = go_on_in_torch(call, **back, batches=data[:STEPS])
    back = across(JAX, tmp_path / "back", back)
    other += go_on_in_jax(step, **back, batches=data[STEPS:])

    assert abs(want[-1] - want[0]) > 1e-3 * abs(want[0])
    for values in (got, other):
        assert np.allclose(values, want, rtol=1e-10, atol=0)
    ended = flat(stayed["loss"])
    for loss in (flat(kdjax.interop.to_jax(went["loss"])), flat(back["loss"])):
        assert loss.keys() == ended.keys()
        for key, x in ended.items():
            assert np.abs(loss[key] - x).max(initial=0) <= 1e-10 * max(1, np.abs(x).max(initial=0)), key


# files


@pytest.fixture
def saved(tmp_path):
    kdjax.interop.save(tmp_path / "state", {"state": kdjax.DINOState(normal(300)), "step": 7})
    return tmp_path / "state"


def test_the_header_says_what_is_inside(saved):
    blob = saved.read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    assert header["state.center"]["shape"] == [300]
    metadata = header["__metadata__"]
    assert metadata["kdlosses"] == importlib.metadata.version("kdlosses")
    assert metadata["holds"] == "DINOState"
    assert set(metadata) == {"kdlosses", "format", "holds", "tree", "sha256"}
    assert safetensors.numpy.load_file(saved)["state.center"].shape == (300,)  # any reader of safetensors can open it


def refusal(path):
    said = []
    for bridge in BRIDGES.values():
        with pytest.raises(ValueError, match=str(path)) as error:
            bridge.load(path)
        said.append(str(error.value))
    assert said[0] == said[1]
    return said[0].removeprefix(f"{path}: ")


def test_truncated_files(saved):
    blob = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 20, 60, 400, len(blob) // 2, len(blob) - 1]:
        saved.write_bytes(blob[:length])
        assert refusal(saved).startswith("truncated: "), length


def test_altered_files(saved):
    blob = saved.read_bytes()
    keys = [blob.index(b'"%s"' % key) + 1 for key in (b"kdlosses", b"sha256", b"tree", b"format")]  # in any order
    for place in [*keys, 30, 60, 100, 300, 450, 600, len(blob) - 700, len(blob) - 1]:
        saved.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        assert refusal(saved).startswith(("altered: ", "truncated: ")), place
    saved.write_bytes(blob + b"more")
    assert refusal(saved).startswith("altered: ")


def test_foreign_files(saved):
    (saved.parent / "plain").write_bytes(safetensors.numpy.save({"x": np.ones(3)}))
    (saved.parent / "other").write_bytes(safetensors.numpy.save({"x": np.ones(3)}, {"of": "another"}))
    np.savez(saved.parent / "arrays.npz", x=np.ones(300))
    torch.save({"x": torch.ones(300)}, saved.parent / "pickle")
    for name in ("plain", "other", "arrays.npz", "pickle"):
        assert refusal(saved.parent / name).startswith("a file of another kind"), name
    with pytest.raises(FileNotFoundError, match="absent"):
        kdjax.interop.load(saved.parent / "absent")


def test_a_file_of_another_version(saved, monkeypatch):
    monkeypatch.setattr("kdlosses.files.FORMAT", "2")
    kdjax.interop.save(saved, kdjax.dino_init(3))
    monkeypatch.undo()
    assert refusal(saved).startswith("of format 2, written by kdlosses ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdlosses.trees.reference", lambda *_: "os:system")
        kdjax.interop.save(saved, {"x": kdjax.nn.FunctionLoss(kdjax.kl_loss)})
    with pytest.raises(ValueError, match="kdjax has no `os:system`; it was made by another version"):
        kdjax.interop.load(saved)


KILLED = """
import os, random, signal, sys, time
import torch
from kdtorch.interop import load, save

torch.set_num_threads(1)
path, random_ = sys.argv[1], random.Random(0)
save(path, torch.zeros(100_000))
kills, changed, last = 0, 0, 0.0
while kills < 50:
    child = os.fork()
    if not child:
        for i in range(1, 1000):
            save(path, torch.full((100_000,), last + i))
        os._exit(0)
    time.sleep(random_.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    whole = load(path)
    assert (whole == whole[0]).all() and whole[0] >= last
    changed += whole[0].item() > last
    last = whole[0].item()
print(changed)
"""


@slow
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "file"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1  # the process was killed while it wrote files


@contextlib.contextmanager
def no_file_beyond(size):
    """A full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("bridge", BRIDGES.values(), ids=BRIDGES)
def test_a_disk_that_cannot_be_written(bridge, saved):
    before = saved.read_bytes()
    with no_file_beyond(1000), pytest.raises(OSError, match=str(saved)) as error:
        bridge.save(saved, {"x": [np.ones(10_000)]})
    assert error.value.errno == errno.EFBIG
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["state"]
    with pytest.raises(OSError, match="absent/file"):
        bridge.save(saved.parent / "absent" / "file", {"x": 1})


def test_through_orbax(tmp_path):
    import orbax.checkpoint

    theirs = kdtorch.DINOState(torch.arange(4.0, dtype=torch.float64))
    module = MODULES["crcd"]()
    weights = nnx.state(module, nnx.Not(nnx.RngState))
    weights = nnx.from_flat_state([(k, x[...]) for k, x in nnx.to_flat_state(weights) if k != ("key",)])
    tree = {"state": kdjax.interop.to_jax(theirs), "module": nnx.to_pure_dict(weights)}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "run", tree)
    assert torch.equal(kdjax.interop.to_torch(back["state"]).center, theirs.center)
    blank = MODULES["crcd"]()
    nnx.update(blank, jax.tree.map(jnp.zeros_like, nnx.state(blank, lambda path, x: path[-1] != "key")))
    nnx.update(blank, back["module"])
    same(flat(kdjax.interop.to_torch(blank)), flat(kdjax.interop.to_torch(module)))
