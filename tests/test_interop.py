"""Teachers, losses, states, weights and files that cross from one framework to the other."""

import copy
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from frameworks import BOTH, JAX, TORCH

import kdjax
import kdjax.interop
import kdjax.nn
import kdtorch
import kdtorch.interop
import kdtorch.nn
from kdbridge.trees import each_leaf, leaves
from parity.cases import LOSSES, Sizes, draw
from parity.compare import ulps

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
    """Gives its input, and what it was made with."""

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
        "jax_teacher: `fn` must be an nnx.Module, or a function with `params` beside it, got builtin.* and None",
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
        "torch_teacher: the output must be an array or a tree of arrays, got object; return what is wanted of it, or "
        "choose it by `output=`",
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
        "torch_teacher: called under jit, .* or make it with inside_jit=True",
    ),
    "a dtype in, that DLPack has not": (
        lambda: torch_teacher(lambda x: x)(jnp.ones(3, "int4")),
        TypeError,
        r"torch_teacher: an array of dtype int4 cannot be handed to PyTorch, .*; cast it first, as by x.astype\(jnp",
    ),
    "a key": (lambda: torch_teacher(lambda x: x)(jax.random.key(0)), TypeError, "an array of dtype key<fry> cannot be"),
    "a dtype out, that DLPack has not": (
        lambda: torch_teacher(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8))(X),
        TypeError,
        r"torch_teacher: a tensor of dtype torch.quint8 cannot be handed to JAX, .* as by x.float\(\)",
    ),
    "a tensor that requires gradient": (
        lambda: jax_teacher(lambda x: x)(T.clone().requires_grad_()),
        ValueError,
        r"jax_teacher: the tensor of shape \[2, 3\] at `\[0\]\[0\]` requires gradient, and through a teacher none flows; "
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
        r"`x.0` is a tensor that requires gradient, and none flows through here; give x.detach\(\)",
    ),
    "a set that crosses": (
        lambda: kdjax.interop.to_torch({"x": {1, 2}}),
        TypeError,
        "`x` is a set, which cannot cross; what can are arrays, numbers, strings, states and modules of this library",
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
        "`function` is a function, which cannot cross",
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
    """The value, the gradients of all that could learn, and the state."""
    given = TORCH.arrays(inputs)
    for x in leaves({k: given[k] for k in loss.learns + loss.constant}).values():
        x.requires_grad_()
    if loss.state:
        given["state"] = getattr(kdtorch, loss.inputs["state"])(**given["state"])
    value, state = function(*given.values()) if loss.state else (function(*given.values()), ())
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


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
@pytest.mark.parametrize("name", ["jax_loss", "torch_loss"])
def test_every_loss_crosses(name, loss):
    """A loss of one package, called from the other, gives the value, the gradients and the state of kdtorch's own."""
    (inputs,) = draw(loss, Sizes(), 0)
    options = {"channel_axis": 1} if "maps" in loss.inputs.values() else {}
    theirs = functools.partial(getattr(kdtorch, loss.name), **options)
    value, slopes, state = in_torch(loss, theirs, inputs)
    if name == "jax_loss":
        ours = functools.partial(getattr(kdjax, loss.name), **options)
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
    """Trees in, a tree of losses and extras out, several inputs that learn, some that do not."""

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


def test_what_was_written_into_has_no_gradient():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 1
    value = kdtorch.interop.jax_loss(lambda x: (x**3).sum())(y)
    y.data_ptr()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_no_gradient_where_none_can_flow():
    loss = kdjax.interop.torch_loss(lambda x: x.detach().sum())
    assert loss(X) == 6
    with pytest.raises(
        ValueError, match="torch_loss: a gradient is asked for where none can flow: .* do not detach it"
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
    assert len(runs) == 4  # the first on zeros
