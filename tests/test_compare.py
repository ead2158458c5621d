"""parity for users' functions and models: what it finds, and what it reports."""

import itertools
import pathlib
import re
import subprocess
import sys

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiers import first, slow

import kdjax.nn
import kdtorch.nn
from parity import assert_parity, compare, compare_modules

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3))
EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def test_equal_functions_pass():
    comparison = compare(jax.nn.log_softmax, lambda x: x.log_softmax(-1), X, dtypes=("float64", "float32", "bfloat16"))
    assert comparison.passed
    assert "float64" in str(comparison)
    assert "all within their limits" in str(comparison)
    assert {x.part for x in comparison.differences} == {"value", "gradient"}
    assert max(x.ulp for x in comparison.differences) > 0


def test_trees_go_in_and_come_out():
    inputs = {"x": X, "pair": [X, (X + 1, np.arange(4))]}

    def ours(tree, scale):
        x, (y, (z, index)) = tree["x"], tree["pair"]
        return {"sum": x * scale + y * z, "index": index, "flag": x > 0}

    assert compare(ours, ours, inputs, np.float64(2.0)).passed


@pytest.mark.parametrize(
    ("ours", "theirs", "part", "says"),
    [
        (jnp.std, torch.std, "value", "ULP (limit 64)"),
        (jnp.sum, torch.mean, "value", "ULP"),
        (lambda x: x.T, lambda x: x, "value", "shape: jax [3, 4], torch [4, 3]"),
        (lambda x: x.sum(0, keepdims=True), lambda x: x.sum(0), "value", "shape: jax [1, 3], torch [3]"),
        (lambda x: x.astype("float32"), lambda x: x, "value", "dtype: jax float32, torch float64"),
        (lambda x: x / 0, lambda x: x, "value", "inf ULP"),
        (lambda x: x * jnp.nan, lambda x: x * torch.nan, "value", "nan"),
        (lambda x: {"a": x}, lambda x: {"a": x, "b": x}, "value", "the trees differ: jax lacks 'b'"),
        (lambda x: (x, x), lambda x: [x], "value", "torch lacks '[1]'"),
        (lambda x: jax.lax.stop_gradient(x) * x, lambda x: x * x, "gradient", "[0]["),
        (lambda x: x * x, lambda x: x.detach() * x.detach(), "gradient", "torch 0.0"),
        (lambda x: jnp.abs(x * 0), lambda x: (x * 0).abs() + x - x.detach(), "gradient", "gradient"),
        (lambda x: jnp.argsort(x), lambda x: x.argsort(descending=True), "value", "limit"),
        (lambda x: jax.lax.complex(x, x), lambda x: torch.complex(x, x), "value", "complex"),
    ],
)
def test_differences_are_found_and_named(ours, theirs, part, says):
    comparison = compare(ours, theirs, X, dtypes=["float64"])
    assert not comparison.passed
    assert part in {x.part for x in comparison.failures}
    assert says in str(comparison)


def test_the_worst_entry_is_named_with_both_numbers():
    def theirs(tree):
        result = tree["x"].clone()
        result[2, 1] += 0.25
        return {"out": result}

    x = np.round(X)
    comparison = compare(lambda tree: {"out": tree["x"]}, theirs, {"x": x}, dtypes=["float32"])
    (worst,) = comparison.failures
    assert (worst.leaf, worst.index, worst.ours, worst.theirs) == ("out", (2, 1), x[2, 1], x[2, 1] + 0.25)
    assert f"value out[2, 1]: jax {float(x[2, 1])}, torch {x[2, 1] + 0.25}" in str(comparison)


def test_limits_can_be_set():
    assert not compare(lambda x: x, lambda x: x * (1 + 1e-4), X, dtypes=["float32"]).passed
    assert compare(lambda x: x, lambda x: x * (1 + 1e-4), X, dtypes=["float32"], limits={"float32": (1e4, 1e4)}).passed


def test_assertion_reads_as_the_table():
    assert_parity(jnp.square, torch.square, X)
    with pytest.raises(AssertionError, match=r"to torch[\s\S]+square float64: value\[\d, \d\]: jax"):
        assert_parity(lambda x: x**2 + 1e-3, torch.square, X)


def test_nothing_compared_is_no_pass():
    assert not compare(dict, dict).passed


def failing(x):
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((failing, torch.square, X), RuntimeError, "the JAX function failing raised KeyError on float64 inputs: 'weights'"),
        ((jnp.square, failing, X), RuntimeError, "the PyTorch function failing raised KeyError on float64 inputs"),
        ((lambda x: {"loss": "0.5"}, torch.square, X), TypeError, "output 'loss' of the JAX function .* must be an array, got str '0.5'"),
        ((jnp.square, lambda x: [x, 3.0], X), TypeError, r"output '\[1\]' of the PyTorch function .* must be an array, got float 3.0"),
        ((jnp.square, lambda x: None, X), TypeError, "the output of the PyTorch function .* got NoneType None"),
        ((jnp.square, torch.square, {"a": [1.0]}), TypeError, r"`inputs\[0\].a\[0\]` must be a NumPy array, got float 1.0; use closures in both functions"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, error, says):
    with pytest.raises(error, match=says):
        compare(*arguments)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="`dtypes` must be of float64, float32, bfloat16, float16, got 'int8'"):
        compare(jnp.square, torch.square, X, dtypes=["int8"])


@slow
@pytest.mark.parametrize("missing", ["jax", "torch"])
def test_a_missing_framework_is_a_failure(missing):
    """The command and the comparison fail, and never skip it."""
    hide = f"import sys; sys.modules[{missing!r}] = None\n"
    tool = hide + "from parity.__main__ import main; sys.exit(main(['--loss', 'mse_loss', '--dtype', 'float64']))"
    done = subprocess.run([sys.executable, "-c", tool], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"{missing} cannot be imported" in done.stderr
    other = "jnp.abs, None" if missing == "torch" else "None, torch.abs"
    lines = f"import numpy\nimport {'jax.numpy as jnp' if missing == 'torch' else 'torch'}\n"
    call = f"from parity import compare; compare({other}, numpy.ones(2))"
    done = subprocess.run([sys.executable, "-c", hide + lines + call], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim, heads, *, epsilon=1e-5, rngs):
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=epsilon, rngs=rngs)
        self.up = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))


class TorchBlock(torch.nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(dim)
        self.attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = torch.nn.LayerNorm(dim)
        self.up = torch.nn.Linear(dim, 4 * dim)
        self.down = torch.nn.Linear(4 * dim, dim)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


def randomised(module):
    """Give a module random weights, because initial biases of 0 and scales of 1 hide errors."""
    state = nnx.state(module, nnx.Param)
    rng = np.random.default_rng(1)
    nnx.update(module, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), state))
    return module


@slow
def test_a_transformer_block():
    ours, theirs = randomised(Block(8, 2, rngs=nnx.Rngs(0))), TorchBlock(8, 2)
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    comparison = compare_modules(ours, theirs, RNG.normal(size=(2, 5, 8)), dtypes=["float32"])
    assert comparison.passed, str(comparison)
    assert [row[0] for row in comparison.rows()][:5] == [
        "`norm1` (LayerNorm), in PyTorch `norm1` (LayerNorm)",
        "`attention` (MultiHeadAttention), in PyTorch `attention` (MultiheadAttention)",
        "`norm2` (LayerNorm), in PyTorch `norm2` (LayerNorm)",
        "`up` (Linear), in PyTorch `up` (Linear)",
        "`down` (Linear), in PyTorch `down` (Linear)",
    ]
    gradients = {x.leaf for x in comparison.differences if x.part == "gradient"}
    assert {name.rpartition(".")[2] for name in gradients} >= {"weight", "bias", "in_proj_weight", "in_proj_bias"}
    assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())  # the caller's module is unchanged


@slow
def test_the_first_layer_that_differs():
    ours, theirs = Block(8, 2, epsilon=1e-3, rngs=nnx.Rngs(0)), TorchBlock(8, 2)
    comparison = compare_modules(ours, theirs, RNG.normal(size=(2, 5, 8)), dtypes=["float32"])
    assert not comparison.passed
    assert comparison.note == "the first that differs is `norm2` (LayerNorm), in PyTorch `norm2` (LayerNorm)"
    assert comparison.note in str(comparison)


@slow
def test_the_digits_student(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import _digits_jax
    import _digits_torch

    ours = randomised(_digits_jax.Net((4, 6), 16, 10, rngs=nnx.Rngs(0)))
    theirs = _digits_torch.Net((4, 6), 16, 10)
    comparison = compare_modules(ours, theirs, RNG.normal(size=(3, 8, 8)))
    assert comparison.passed, str(comparison)
    assert {x.leaf for x in comparison.differences if x.subject == "output"} == {
        "logits",
        "embedding",
        "maps[0]",
        "maps[1]",
    }


class Net(nnx.Module):
    """A model with one of each known layer."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.shift = nnx.Param(jnp.ones(6))
        self.conv1 = nnx.Conv(6, 8, (3,), feature_group_count=2, rngs=rngs)
        self.batch = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3, 5), rngs=rngs)
        self.group = nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=rngs)
        self.rms = nnx.RMSNorm(6, epsilon=1e-5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 3, use_bias=False, rngs=rngs)])

    def __call__(self, tokens):
        x = self.batch(self.conv1(self.embed(tokens) + self.shift[...][None, None]))
        x = self.group(self.conv(x.reshape(len(x), -1, 5, 4)))
        return self.layers[0](self.rms(x.mean((1, 2))))


class TorchNet(torch.nn.Module):
    """The same model with other names."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(7, 6)
        self.shift = torch.nn.Parameter(torch.zeros(6))
        self.first = torch.nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.second = torch.nn.BatchNorm1d(8)
        self.third = torch.nn.Conv2d(4, 6, (3, 5), padding="same")
        self.fourth = torch.nn.GroupNorm(3, 6)
        self.fifth = torch.nn.RMSNorm(6, eps=1e-5)
        self.sixth = torch.nn.Linear(6, 3, bias=False)

    def forward(self, tokens):
        x = self.second(self.first((self.words(tokens) + self.shift).mT)).mT
        x = self.fourth(self.third(x.reshape(len(x), -1, 5, 4).movedim(-1, 1)))
        return self.sixth(self.fifth(x.mean((2, 3))))


@slow
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_that_is_known(training):
    ours, theirs = randomised(Net(nnx.Rngs(0))), TorchNet()
    if not training:
        ours.eval(), theirs.eval()
        ours.batch.mean[...] = jnp.asarray(RNG.normal(size=8), "float32")
        ours.batch.var[...] = jnp.asarray(RNG.uniform(1, 2, size=8), "float32")
    # the embedding is [N, L, C] in both; the outputs of Conv1d and its norm have their channels first in PyTorch
    tokens = RNG.integers(7, size=(3, 10))
    comparison = compare_modules(ours, theirs, tokens, limits={"float32": (256, 1024)})
    assert comparison.passed, str(comparison)
    kept = {x.leaf for x in comparison.differences if x.part == "state"}
    assert kept == {"second.running_mean", "second.running_var"}


def small(*layers):
    return torch.nn.Sequential(*layers)


def linear(*sizes, between=jnp.tanh, **options):
    """Linear layers with a function between them."""
    layers = [nnx.Linear(*pair, rngs=nnx.Rngs(i), **options) for i, pair in enumerate(itertools.pairwise(sizes))]
    return nnx.Sequential(*[x for layer in layers for x in (between, layer)][1:])


def build(kind, *args, mode="train", **options):
    layer = kind(*args, **options, rngs=nnx.Rngs(0))
    getattr(layer, mode)()
    return layer


def batch_norm(features=3, *, momentum=0.9, **options):
    return build(nnx.BatchNorm, features, momentum=momentum, **options)


def twice(layer, other):
    norm, twin = layer(), other()
    return nnx.Sequential(norm, jnp.tanh, norm), small(twin, torch.nn.Tanh(), twin)


IMAGES, TOKENS = RNG.normal(size=(4, 6, 5, 3)), RNG.normal(size=(2, 7, 4))
VOLUMES = RNG.normal(size=(2, 4, 3, 5, 3))


class Scaled(nnx.Module):
    """An unknown layer: a parameter, an average, and a known layer inside."""

    def __init__(self, dim):
        self.scale, self.mean = nnx.Param(jnp.arange(1.0, dim + 1)), nnx.BatchStat(jnp.zeros(dim))
        self.parts = nnx.Sequential(nnx.Linear(dim, dim, rngs=nnx.Rngs(0)), jnp.tanh)

    def __call__(self, x):
        self.mean[...] = self.mean[...] / 2 + x.mean(0) / 2
        return self.parts(x * self.scale[...][None])


class BatchNorm(Scaled):
    """A layer with the name of Flax's, but of another class."""


class TorchScaled(torch.nn.Module):
    def __init__(self, dim, keep=0.5):
        super().__init__()
        self.scale, self.parts = torch.nn.Parameter(torch.ones(dim)), small(torch.nn.Linear(dim, dim), torch.nn.Tanh())
        self.register_buffer("mean", torch.zeros(dim))
        self.keep = keep

    def forward(self, x):
        self.mean.copy_(self.keep * self.mean + (1 - self.keep) * x.detach().mean(0))
        return self.parts(x * self.scale)


class TorchRenamed(torch.nn.Module):
    """The same layer without the average, and with the scale as a column."""

    def __init__(self, dim):
        super().__init__()
        self.column, self.head = torch.nn.Parameter(torch.ones(dim, 1)), torch.nn.Linear(dim, dim)

    def forward(self, x):
        return self.head((x.T * self.column).T).tanh()


def tensor(x):
    return torch.tensor(np.array(x[...]))


def renamed(ours, theirs):
    theirs.column.copy_(tensor(ours.scale)[:, None])
    theirs.head.weight.copy_(tensor(ours.parts.layers[0].kernel).T)
    theirs.head.bias.copy_(tensor(ours.parts.layers[0].bias))


def slope(ours, theirs):
    theirs.weight.copy_(tensor(ours.negative_slope))


class Block2d(nnx.Module):
    def __init__(self, momentum=0.9):
        self.conv, self.norm = build(nnx.Conv, 3, 4, (3, 3)), batch_norm(4, momentum=momentum)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.conv(x)))


class TorchBlock2d(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Asked(nnx.Module):
    """A model whose call sets the mode of its norm."""

    def __init__(self, averages):
        self.norm, self.averages = nnx.BatchNorm(3, momentum=0.9, use_running_average=None, rngs=nnx.Rngs(0)), averages

    def __call__(self, x):
        return self.norm(x, use_running_average=self.averages)


class Tied(nnx.Module):
    def __init__(self, tie, called=True):
        self.a, self.b = (nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2))
        self.called = called
        if tie:
            self.b.kernel = self.a.kernel

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x))) if self.called else self.a(x)


class TorchTied(torch.nn.Module):
    def __init__(self, tie, called=True):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.called = called
        if tie:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh()) if self.called else self.a(x)


class Cross(nnx.Module):
    def __init__(self, heads=2):
        self.attention = nnx.MultiHeadAttention(heads, 4, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x, y):
        return self.attention(x, inputs_k=y)


class TorchCross(torch.nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x, y):
        if self.attention.batch_first:
            return self.attention(x, y, y)[0]
        x, y = x.swapaxes(0, 1), y.swapaxes(0, 1)
        return self.attention(query=x, key=y, value=y, need_weights=False)[0].swapaxes(0, 1)


class Centred(nnx.Module):
    def __init__(self):
        self.mean, self.head = nnx.Variable(jnp.full(3, 0.5)), nnx.Linear(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(x - self.mean[...][None])


class TorchCentred(torch.nn.Module):
    def __init__(self, mean=0.5):
        super().__init__()
        self.head = torch.nn.Linear(3, 4)
        self.register_buffer("mean", torch.full((3,), mean))

    def forward(self, x):
        return self.head(x - self.mean)


# models that are equal, however they are built: the two modules, the inputs, and further arguments
EQUAL = {
    "batch norm 1d": lambda: (batch_norm(), torch.nn.BatchNorm1d(3), X),
    "batch norm 1d of three axes": lambda: (batch_norm(4), torch.nn.BatchNorm1d(4), TOKENS),
    "batch norm 2d without a convolution": lambda: (batch_norm(), torch.nn.BatchNorm2d(3), IMAGES),
    "batch norm 3d": lambda: (batch_norm(), torch.nn.BatchNorm3d(3), VOLUMES),
    "batch norm with its channels first in both": lambda: (batch_norm(axis=1), torch.nn.BatchNorm2d(3), np.moveaxis(IMAGES, -1, 1)),
    "batch norm of another momentum": lambda: (batch_norm(momentum=0.7), torch.nn.BatchNorm2d(3, momentum=0.3), IMAGES),
    "batch norm in eval mode, whose momentum is of no account": lambda: (
        build(nnx.BatchNorm, 3, mode="eval"), torch.nn.BatchNorm2d(3).eval(), IMAGES),
    "batch norm whose call says what it uses": lambda: (Asked(True), small(torch.nn.BatchNorm1d(3)).eval(), X),
    "batch norm whose call says that it learns": lambda: (Asked(False), small(torch.nn.BatchNorm1d(3)), X),
    "batch norm called twice": lambda: (*twice(batch_norm, lambda: torch.nn.BatchNorm2d(3)), IMAGES),
    "batch norm without scale and bias": lambda: (
        batch_norm(use_scale=False, use_bias=False), torch.nn.BatchNorm1d(3, affine=False), X),
    "group norm": lambda: (build(nnx.GroupNorm, 3, num_groups=3, epsilon=1e-5), torch.nn.GroupNorm(3, 3), IMAGES),
    "group norm of two axes": lambda: (build(nnx.GroupNorm, 4, num_groups=2, epsilon=1e-5), torch.nn.GroupNorm(2, 4), TOKENS[:, 0]),
    "instance norm": lambda: (build(nnx.InstanceNorm, 3, epsilon=1e-5), torch.nn.InstanceNorm2d(3, affine=True), IMAGES),
    "pooling alone": lambda: (
        nnx.Sequential(lambda x: nnx.max_pool(x, (2, 2), (2, 2)), lambda x: x.mean((1, 2)), nnx.Linear(3, 2, rngs=nnx.Rngs(0))),
        small(torch.nn.MaxPool2d(2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)), IMAGES),
    "norm, then convolution": lambda: (
        nnx.Sequential(batch_norm(), build(nnx.Conv, 3, 4, (3, 3))),
        small(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3, padding=1)), IMAGES),
    "strides and explicit padding": lambda: (
        build(nnx.Conv, 3, 4, (3, 3), 2, padding=1), torch.nn.Conv2d(3, 4, 3, 2, padding=1), IMAGES),
    "strides and SAME where it is symmetric": lambda: (
        build(nnx.Conv, 3, 4, (3, 3), 2), torch.nn.Conv2d(3, 4, 3, 2, padding=1), IMAGES[:, :5]),
    "dilation": lambda: (
        build(nnx.Conv, 3, 4, (3, 3), kernel_dilation=2, padding="VALID"), torch.nn.Conv2d(3, 4, 3, dilation=2), IMAGES),
    "circular padding": lambda: (
        build(nnx.Conv, 3, 4, (3, 3), padding="CIRCULAR"), torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), IMAGES),
    "padding by name": lambda: (build(nnx.Conv, 3, 4, (5, 3)), torch.nn.Conv2d(3, 4, (5, 3), padding="same"), IMAGES),
    "padding that the model does by itself": lambda: (
        nnx.Sequential(build(nnx.Conv, 3, 4, (3, 3), 2)),
        small(torch.nn.ZeroPad2d((1, 1, 0, 1)), torch.nn.Conv2d(3, 4, 3, 2)), IMAGES),
    "causal padding": lambda: (
        nnx.Sequential(build(nnx.Conv, 4, 5, (3,), padding="CAUSAL")),
        small(torch.nn.ConstantPad1d((2, 0), 0.0), torch.nn.Conv1d(4, 5, 3)), TOKENS),
    "a layer of one's own, called as a known one": lambda: (
        nnx.Sequential(BatchNorm(3)), small(TorchScaled(3)), X, {"layers": {BatchNorm: TorchScaled}}),
    "transposed convolution": lambda: (
        build(nnx.ConvTranspose, 3, 4, (2, 2), 2), torch.nn.ConvTranspose2d(3, 4, 2, 2), IMAGES),
    "transposed convolution 1d": lambda: (
        build(nnx.ConvTranspose, 4, 5, (4,), 3, padding="VALID"), torch.nn.ConvTranspose1d(4, 5, 4, 3), TOKENS),
    "transposed convolution of a transposed kernel": lambda: (
        build(nnx.ConvTranspose, 3, 4, (3, 2), 2, padding="VALID", transpose_kernel=True),
        torch.nn.ConvTranspose2d(3, 4, (3, 2), 2), IMAGES),
    "transposed convolution with explicit padding": lambda: (
        build(nnx.ConvTranspose, 3, 4, (3, 3), 2, padding=((1, 2), (1, 2))),
        torch.nn.ConvTranspose2d(3, 4, 3, 2, padding=1, output_padding=1), IMAGES),
    "an activation in place": lambda: (linear(3, 8, 2, between=jax.nn.relu), small(torch.nn.Linear(3, 8), torch.nn.ReLU(inplace=True), torch.nn.Linear(8, 2)), X),
    "tied in both": lambda: (Tied(True), TorchTied(True), X),
    "a layer that neither calls": lambda: (Tied(False, called=False), TorchTied(False, called=False), X),
    "a buffer of the same name": lambda: (Centred(), TorchCentred(), X),
    "a state of this library": lambda: (kdjax.nn.DINOLoss(3), kdtorch.nn.DINOLoss(3), X, X),
    "a layer of one's own": lambda: (
        nnx.Sequential(Scaled(3), nnx.Linear(3, 2, rngs=nnx.Rngs(1))), small(TorchScaled(3), torch.nn.Linear(3, 2)), X,
        {"layers": {Scaled: TorchScaled}}),
    "a layer of one's own, by a function": lambda: (
        nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(1)), Scaled(3)), small(torch.nn.Linear(3, 3), TorchRenamed(3)), X,
        {"layers": {Scaled: (TorchRenamed, renamed)}}),
    "a layer that has no twin by itself": lambda: (
        nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(1)), nnx.PReLU()), small(torch.nn.Linear(3, 3), torch.nn.PReLU()), X,
        {"layers": {nnx.PReLU: (torch.nn.PReLU, slope)}}),
    "a block of one's own, of images": lambda: (Block2d(), TorchBlock2d(), IMAGES, {"layers": {Block2d: TorchBlock2d}}),
    "attention, the batch first": lambda: (Cross(), TorchCross(True), TOKENS, TOKENS[:, :3], {"dtypes": ["float32"]}),
    "attention, the batch second": lambda: (Cross(), TorchCross(False), TOKENS, TOKENS[:, :3], {"dtypes": ["float32"]}),
    "half precision": lambda: (
        nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), batch_norm(mode="eval")),
        small(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3).eval()), X,
        {"dtypes": ["bfloat16"]}),
}  # fmt: skip


def compared(case, **defaults):
    *arguments, options = case if isinstance(case[-1], dict) else (*case, {})
    return compare_modules(*arguments, **{**defaults, **options})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_modules_that_are_equal(case):
    comparison = compared(case())
    assert comparison.passed, str(comparison)
    assert comparison.note == ""


BETWEEN = "what is computed between "
TWO = BETWEEN + "`layers.0` (Linear), in PyTorch `0` (Linear), and `layers.2` (Linear), in PyTorch `2` (Linear)"
ONE_NORM = "BatchNorm, in PyTorch BatchNorm2d"


def activations(ours, theirs):
    return lambda: (linear(3, 8, 2, between=ours), small(torch.nn.Linear(3, 8), theirs, torch.nn.Linear(8, 2)), X)


# models that differ: the case, the first difference, the parts that fail, and a word of the report
DIFFERENT = {
    "gelu": (activations(jax.nn.gelu, torch.nn.GELU()), TWO, {"value", "gradient"}, ""),
    "the slope of a leaky ReLU": (activations(lambda x: jax.nn.leaky_relu(x, 0.2), torch.nn.LeakyReLU()), TWO, {"value", "gradient"}, ""),
    "an activation that is missing": (activations(lambda x: x, torch.nn.ReLU()), TWO, {"value", "gradient"}, ""),
    "an activation too many": (activations(jax.nn.relu, torch.nn.Identity()), TWO, {"value", "gradient"}, ""),
    "what comes first": (
        lambda: (nnx.Sequential(jnp.tanh, nnx.Linear(3, 2, rngs=nnx.Rngs(0))), small(torch.nn.Linear(3, 2)), X),
        BETWEEN + "the inputs and `layers.1` (Linear), in PyTorch `0` (Linear)", {"value", "gradient"}, ""),
    "what comes last": (
        lambda: (linear(3, 2), small(torch.nn.Linear(3, 2), torch.nn.Softmax(-1)), X),
        BETWEEN + "`layers.0` (Linear), in PyTorch `0` (Linear), and the output", {"value", "gradient"}, ""),
    "momentum": (lambda: (batch_norm(momentum=0.99), torch.nn.BatchNorm2d(3), IMAGES), ONE_NORM, {"setting", "state"},
        "momentum is 0.99 in Flax, which is 0.01 in PyTorch, where it weighs the new batch; there it is 0.1"),
    "no momentum": (lambda: (batch_norm(), torch.nn.BatchNorm2d(3, momentum=None), IMAGES), ONE_NORM, {"setting", "state"},
        "there it is None, an average of all batches"),
    "momentum, called twice": (
        lambda: (*twice(batch_norm, lambda: torch.nn.BatchNorm2d(3, momentum=0.2)), IMAGES),
        "`layers.0` (BatchNorm), in PyTorch `0` (BatchNorm2d)", {"setting", "state"}, "0.running_var"),
    "momentum, inside of a layer of one's own": (
        lambda: (Block2d(0.8), TorchBlock2d(), IMAGES, {"layers": {Block2d: TorchBlock2d}}),
        "the state of Block2d, in PyTorch TorchBlock2d", {"state"}, "norm.running_mean"),
    "modes": (lambda: (build(nnx.BatchNorm, 3, momentum=0.9, mode="eval"), torch.nn.BatchNorm2d(3), IMAGES), ONE_NORM,
        {"setting", "value", "gradient", "state"}, "it is in eval mode in Flax, in training mode in PyTorch"),
    "epsilon of a batch norm": (lambda: (batch_norm(epsilon=1e-3), torch.nn.BatchNorm2d(3), IMAGES), ONE_NORM,
        {"setting", "value", "gradient"}, "epsilon is 0.001 in Flax, eps is 1e-05 in PyTorch"),
    "an epsilon that float32 does not show": (
        lambda: (build(nnx.LayerNorm, 3, epsilon=1.5e-5), torch.nn.LayerNorm(3), 100 * X, {"dtypes": ["float32"]}),
        "LayerNorm, in PyTorch LayerNorm", {"setting"}, "epsilon is 1.5e-05 in Flax, eps is 1e-05 in PyTorch"),
    "epsilon of PyTorch's RMSNorm, which is that of the dtype": (
        lambda: (build(nnx.RMSNorm, 3), torch.nn.RMSNorm(3), X, {"dtypes": ["float32"]}),
        "RMSNorm, in PyTorch RMSNorm", {"setting"}, "epsilon is 1e-06 in Flax, eps is 1.19209e-07 in PyTorch"),
    "groups": (
        lambda: (build(nnx.GroupNorm, 4, num_groups=4, epsilon=1e-5), torch.nn.GroupNorm(2, 4), np.moveaxis(TOKENS[None], 1, 0)),
        "GroupNorm, in PyTorch GroupNorm", {"setting", "value", "gradient"}, "num_groups is 4 in Flax, 2 in PyTorch"),
    "SAME and strides": (
        lambda: (build(nnx.Conv, 3, 4, (3, 3), 2), torch.nn.Conv2d(3, 4, 3, 2, padding=1), IMAGES), "Conv, in PyTorch Conv2d",
        {"setting", "value", "gradient"}, "padding is 'SAME' in Flax, here [(0, 1), (1, 1)], and (1, 1) in PyTorch, here [(1, 1), (1, 1)]"),
    "strides": (
        lambda: (build(nnx.Conv, 3, 4, (3, 3)), torch.nn.Conv2d(3, 4, 3, 2, padding=1), IMAGES), "Conv, in PyTorch Conv2d",
        {"setting", "value", "gradient"}, "strides is (1, 1) in Flax, stride is (2, 2) in PyTorch"),
    "another way of padding": (
        lambda: (build(nnx.Conv, 3, 4, (3, 3)), torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), IMAGES),
        "Conv, in PyTorch Conv2d", {"setting", "value", "gradient"}, "padding is 'SAME' in Flax, padding_mode is 'reflect' in PyTorch"),
    "padding of a transposed convolution": (
        lambda: (build(nnx.ConvTranspose, 3, 4, (3, 3), 2), torch.nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), IMAGES),
        "ConvTranspose, in PyTorch ConvTranspose2d", {"setting", "value", "gradient"}, "here [(2, 1), (2, 1)]"),
    "a row of an embedding that does not learn": (
        lambda: (build(nnx.Embed, 5, 3), torch.nn.Embedding(5, 3, padding_idx=0), np.array([[0, 1], [2, 0]])),
        "the gradient of Embed, in PyTorch Embedding", {"gradient"}, "torch 0.0"),
    "heads": (
        lambda: (Cross(4), TorchCross(True), TOKENS, TOKENS, {"dtypes": ["float32"]}),
        "`attention` (MultiHeadAttention), in PyTorch `attention` (MultiheadAttention)", {"setting", "value", "gradient"},
        "num_heads is 4 in Flax, 2 in PyTorch"),
    "a buffer": (lambda: (Centred(), TorchCentred(0.4), X), BETWEEN + "the inputs and `head` (Linear), in PyTorch `head` (Linear)",
        {"value", "gradient", "state"}, "`mean` float64: state mean"),
    "an average of one's own": (
        lambda: (Scaled(3), TorchScaled(3, 0.9), X, {"layers": {Scaled: TorchScaled}}),
        "the state of Scaled, in PyTorch TorchScaled", {"state"}, ""),
    "a state of this library": (
        lambda: (kdjax.nn.DINOLoss(3, center_momentum=0.5), kdtorch.nn.DINOLoss(3), X, X), "the state of `center`", {"state"}, ""),
    "a copy that is wrong": (
        lambda: (nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0))), small(torch.nn.Linear(3, 3)), X, {"layers": {
            nnx.Linear: (torch.nn.Linear, lambda f, t: (t.weight.copy_(tensor(f.kernel)), t.bias.copy_(tensor(f.bias))))}}),
        "`layers.0` (Linear), in PyTorch `0` (Linear)", {"value", "gradient"}, ""),
}  # fmt: skip


@pytest.mark.parametrize(("case", "first", "parts", "says"), first(8, DIFFERENT.values()), ids=DIFFERENT)
def test_modules_that_differ(case, first, parts, says):
    comparison = compared(case(), dtypes=["float64"])
    assert comparison.note == f"the first that differs is {first}", str(comparison)
    assert {x.part for x in comparison.failures} == parts, str(comparison)
    assert says in " ".join(map(str, comparison.failures))
    assert says in " ".join(str(comparison).split())


def test_an_activation_is_not_blamed_on_the_layers_around_it():
    ours = linear(3, 8, 8, 8, 2, between=jnp.tanh)
    layers = [torch.nn.Linear(*pair) for pair in ((3, 8), (8, 8), (8, 8), (8, 2))]
    acts = torch.nn.Tanh(), torch.nn.Hardtanh(), torch.nn.Tanh()
    theirs = small(*[x for pair in zip(layers, acts, strict=False) for x in pair], layers[-1])
    comparison = compare_modules(ours, theirs, X, dtypes=["float64"])
    assert comparison.note == (
        "the first that differs is what is computed between `layers.2` (Linear), in PyTorch `2` (Linear), and `layers.4` "
        "(Linear), in PyTorch `4` (Linear)"
    )
    assert [x.subject for x in comparison.failures if x.subject.startswith("what")] == [comparison.failures[0].subject]


def half(f, t):
    t.weight[0].copy_(tensor(f.kernel).T[0])


class Drops(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)

    def forward(self, x):
        return torch.nn.functional.dropout(self.layer(x), 0.5)


class Jitted(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.jit(lambda layer, x: layer(x))(self.layer, x)


OURS, THEIRS = lambda **options: build(nnx.Linear, 3, 4, **options), lambda **options: torch.nn.Linear(3, 4, **options)
BOTH_BIASES = "build both with one (use_bias=True in Flax, bias=True in PyTorch), or both without (use_bias=False in Flax, bias=False in PyTorch)"
BOTH_AFFINE = "build both with one (use_bias=True and use_scale=True in Flax, affine=True in PyTorch), or both without"
WORDS = {
    "a bias in PyTorch alone": (lambda: (OURS(use_bias=False), THEIRS(), X), TypeError,
        "compare_modules: Linear of PyTorch has a bias, and Linear of Flax has none; " + BOTH_BIASES),
    "a bias in Flax alone": (lambda: (linear(3, 4), small(THEIRS(bias=False)), X), TypeError,
        "compare_modules: `layers.0` (Linear) of Flax has a bias, and `0` (Linear) of PyTorch has none; " + BOTH_BIASES),
    "a bias of a convolution": (lambda: (build(nnx.Conv, 3, 4, (3, 3), use_bias=False), torch.nn.Conv2d(3, 4, 3, padding=1), IMAGES),
        TypeError, "Conv2d of PyTorch has a bias, and Conv of Flax has none; " + BOTH_BIASES),
    "a bias of attention": (lambda: (Cross(), (lambda t: setattr(t, "attention", torch.nn.MultiheadAttention(4, 2, bias=False, batch_first=True)) or t)(TorchCross(True)), TOKENS, TOKENS),
        TypeError, "`attention` (MultiHeadAttention) of Flax has a bias, and `attention` (MultiheadAttention) of PyTorch has none; " + BOTH_BIASES),
    "a bias of a layer norm": (lambda: (build(nnx.LayerNorm, 3, use_bias=False), torch.nn.LayerNorm(3), X), TypeError,
        "LayerNorm of PyTorch has a bias, and LayerNorm of Flax has none; " + BOTH_BIASES),
    "a scale of a layer norm": (lambda: (build(nnx.LayerNorm, 3), torch.nn.LayerNorm(3, elementwise_affine=False), X), TypeError,
        "LayerNorm of Flax has a scale, and LayerNorm of PyTorch has none; build both with one (use_scale=True in Flax, elementwise_affine=True in PyTorch)"),
    "a norm without scale and bias": (lambda: (batch_norm(), torch.nn.BatchNorm1d(3, affine=False), X), TypeError,
        "BatchNorm of Flax has a scale, and BatchNorm1d of PyTorch has none; " + BOTH_AFFINE),
    "an instance norm, which has none by default": (lambda: (build(nnx.InstanceNorm, 3), torch.nn.InstanceNorm2d(3), IMAGES), TypeError,
        "InstanceNorm of Flax has a scale, and InstanceNorm2d of PyTorch has none; " + BOTH_AFFINE),
    "no running statistics": (lambda: (batch_norm(), torch.nn.BatchNorm1d(3, track_running_stats=False), X), TypeError,
        "BatchNorm1d of PyTorch has no running statistics, and BatchNorm of Flax has; build it with track_running_stats=True"),
    "the other way round": (lambda: (THEIRS(), OURS(), X), TypeError,
        "compare_modules: the Flax module comes first and the PyTorch module second, and they were given the other way round"),
    "two of PyTorch": (lambda: (THEIRS(), THEIRS(), X), TypeError, "`nnx_module` must be an nnx.Module, got Linear, a PyTorch module"),
    "two of Flax": (lambda: (OURS(), OURS(), X), TypeError, "`torch_module` must be a torch.nn.Module, got Linear, a Flax module"),
    "a Linen module": (lambda: (flax.linen.Dense(4), THEIRS(), X), TypeError,
        "`nnx_module` must be an nnx.Module, got Dense, a Linen module; write the model with flax.nnx, or compare its outputs alone: "
        "parity.compare(lambda x: model.apply(variables, x), torch_module, x)"),
    "a Linen module second": (lambda: (OURS(), flax.linen.Dense(4), X), TypeError, "`torch_module` must be a torch.nn.Module, got Dense, a Linen module"),
    "a class": (lambda: (nnx.Linear, THEIRS(), X), TypeError, "`nnx_module` must be an nnx.Module, got the class Linear; give a module that is built of it"),
    "a class second": (lambda: (OURS(), torch.nn.Linear, X), TypeError, "`torch_module` must be a torch.nn.Module, got the class Linear"),
    "a function": (lambda: (jnp.tanh, THEIRS(), X), TypeError, "`nnx_module` must be an nnx.Module, got a "),
    "a dtype": (lambda: (OURS(), THEIRS(), X, {"dtypes": "float32"}), ValueError,
        'compare_modules: `dtypes` must be a list of names, got the name alone: write dtypes=["float32"]'),
    "an unknown dtype": (lambda: (OURS(), THEIRS(), X, {"dtypes": ["float8"]}), ValueError, "`dtypes` must be of float64, float32, bfloat16, float16, got 'float8'"),
    "layers the other way round": (lambda: (OURS(), THEIRS(), X, {"layers": {torch.nn.PReLU: nnx.PReLU}}), TypeError,
        "`layers` must be {MyFlaxLayer: MyTorchLayer} or {MyFlaxLayer: (MyTorchLayer, copy_weights)}, of classes and a function of a layer of each, got {PReLU: PReLU}"),
    "layers that are no classes": (lambda: (OURS(), THEIRS(), X, {"layers": {nnx.PReLU: (torch.nn.PReLU, 3)}}), TypeError,
        "got {PReLU: (PReLU, 3)}"),
    "a layer of one's own that is not named": (lambda: (nnx.Sequential(Scaled(3)), small(TorchScaled(3)), X), TypeError,
        "of layers of your own say layers={MyFlaxLayer: MyTorchLayer}, or layers={MyFlaxLayer: (MyTorchLayer, copy_weights)}"),
    "a copy of half a weight": (lambda: (OURS(use_bias=False), THEIRS(bias=False), X, {"layers": {nnx.Linear: (torch.nn.Linear, half)}}), TypeError,
        "the function that copies the weights of Linear, in PyTorch Linear does not set all of `weight`"),
    "a copy that fails": (lambda: (OURS(), THEIRS(), X, {"layers": {nnx.Linear: (torch.nn.Linear, lambda f, t: t.wieght)}}), RuntimeError,
        "the function that copies the weights of Linear, in PyTorch Linear raised AttributeError: 'Linear' object has no attribute 'wieght'"),
    "tied in PyTorch alone": (lambda: (Tied(False), TorchTied(True), X), ValueError,
        "`a.weight` and `b.weight` are one tensor in PyTorch and two arrays in Flax, of `a` (Linear), in PyTorch `a` (Linear) and of `b` (Linear), in PyTorch `b` (Linear); tie them in Flax too, or in neither"),
    "tied in Flax alone": (lambda: (Tied(True), TorchTied(False), X), TypeError,
        "`b.weight`, of a PyTorch Linear, has no counterpart in Flax, for `b` (Linear) has no such weight of its own; if it is tied to another, tie it in both"),
    "not called in PyTorch": (lambda: (linear(3, 3), TorchTied(False, called=False), X), TypeError,
        "`b.weight`, of a PyTorch Linear, has no counterpart in Flax, for `b` (Linear) is not called on these inputs"),
    "not called in Flax": (lambda: (Tied(False, called=False), small(torch.nn.Linear(3, 3)), X), TypeError, "for `b` (Linear) is not called on these inputs"),
    "groups of a convolution": (lambda: (build(nnx.Conv, 4, 4, (3,), feature_group_count=2), torch.nn.Conv1d(4, 4, 3, padding=1), TOKENS), ValueError,
        "`weight` is [4, 2, 3] from Flax, [4, 4, 3] in PyTorch; feature_group_count is 2 in Flax, groups is 1 in PyTorch"),
    "a dropout": (lambda: (linear(3, 4), small(THEIRS(), torch.nn.Dropout1d(0.5)), X), ValueError, "`1` of PyTorch drops at random: call .eval() on both modules first"),
    "a dropout of Flax": (lambda: (nnx.Sequential(OURS(), nnx.Dropout(0.5, rngs=nnx.Rngs(0))), small(THEIRS()), X), ValueError, "`layers.1` of Flax drops at random"),
    "a dropout that is a function, in eval mode": (lambda: (nnx.Sequential(OURS()), Drops().eval(), X), ValueError,
        "such as torch.nn.functional.dropout, which draws in eval mode too without training=self.training"),
    "layers that are not seen": (lambda: (Jitted(), THEIRS(), X), ValueError, "layers inside of nnx.jit, nnx.remat, nnx.scan or nnx.vmap are not seen"),
    "another layout": (lambda: (build(nnx.BatchNorm, 3), torch.nn.BatchNorm2d(3), IMAGES, {"channels_first": ()}), RuntimeError,
        "(it was given its arrays as they are: see `channels_first`)"),
    "a layout that is not meant": (lambda: (nnx.Sequential(batch_norm()), small(torch.nn.BatchNorm2d(6)), IMAGES), RuntimeError,
        "(it was given arrays of 4 axes as [N, C, ...]: see `channels_first`)"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "error", "says"), WORDS.values(), ids=WORDS)
def test_what_is_said_of_modules_that_cannot_be_compared(case, error, says):
    with pytest.raises(error, match=re.escape(says)):
        compared(case())


def test_dtypes_of_functions():
    with pytest.raises(
        ValueError,
        match=re.escape('compare: `dtypes` must be a list of names, got the name alone: write dtypes=["float32"]'),
    ):
        compare(jnp.square, torch.square, X, dtypes="float32")


def test_nothing_of_the_callers_is_changed():
    ours, theirs = Block2d(), TorchBlock2d()
    before = [np.array(x) for x in jax.tree.leaves(nnx.state(ours))], [x.clone() for x in theirs.state_dict().values()]
    calls = nnx.BatchNorm.__call__, nnx.Conv.__call__
    compare_modules(ours, theirs, IMAGES, dtypes=["float64"])
    assert all(map(np.array_equal, jax.tree.leaves(nnx.state(ours)), before[0]))
    assert all(map(torch.equal, theirs.state_dict().values(), before[1]))
    assert (nnx.BatchNorm.__call__, nnx.Conv.__call__) == calls
    assert not any(x._forward_hooks for x in theirs.modules())


@pytest.mark.parametrize(
    ("theirs", "error", "says"),
    [
        (small(torch.nn.Linear(3, 4), torch.nn.PReLU()), TypeError, "`1.weight`, of a PyTorch PReLU, has no counterpart in Flax; known are Linear"),
        (small(torch.nn.Linear(3, 5)), ValueError, r"`layers.0` \(Linear\), in PyTorch `0` \(Linear\): `0.(weight|bias)` is \[4(, 3)?\] from Flax, \[5"),
        (small(torch.nn.LayerNorm(3)), ValueError, r"call 0 is of `layers.0` \(Linear\) in Flax and of `0` \(LayerNorm\) in PyTorch"),
        (small(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)), ValueError, r"call 1 is of no layer in Flax and of `1` \(Linear\)"),
        (small(torch.nn.Linear(3, 4), torch.nn.Dropout(0.1)), ValueError, "`1` of PyTorch drops at random: call .eval"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(theirs, error, says):
    ours = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(error, match=says):
        compare_modules(ours, theirs, X)


def test_a_layer_of_flax_that_is_not_known():
    ours = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.PReLU())
    with pytest.raises(
        TypeError, match=r"`layers.1.negative_slope` of Flax has no counterpart `layers.1.negative_slope`"
    ):
        compare_modules(ours, small(torch.nn.Linear(3, 4)), X)


def test_a_layer_called_twice():
    layer, twice = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 3)
    assert compare_modules(nnx.Sequential(layer, layer), small(twice, twice), X).passed
    with pytest.raises(ValueError, match="a layer must have one counterpart"):
        compare_modules(nnx.Sequential(layer, layer), small(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), X)
    with pytest.raises(ValueError, match="a layer must have one counterpart"):
        compare_modules(nnx.Sequential(layer, nnx.Linear(3, 3, rngs=nnx.Rngs(1))), small(twice, twice), X)
