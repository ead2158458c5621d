"""parity for anybody's functions and models: what it finds, and what it says."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

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
        ((jnp.square, torch.square, {"a": [1.0]}), TypeError, r"`inputs\[0\].a\[0\]` must be a NumPy array, got float 1.0; let both functions close"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, error, says):
    with pytest.raises(error, match=says):
        compare(*arguments)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="`dtypes` must be of float64, float32, bfloat16, float16, got 'int8'"):
        compare(jnp.square, torch.square, X, dtypes=["int8"])


@pytest.mark.parametrize("missing", ["jax", "torch"])
def test_a_missing_framework_is_a_failure(missing):
    """Of the tool, of a comparison, never a skip."""
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
    """A transformer block with the norms first."""

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
    """Biases are 0 and scales 1 at first, which hides much."""
    state = nnx.state(module, nnx.Param)
    rng = np.random.default_rng(1)
    nnx.update(module, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), state))
    return module


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
    assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())  # nothing of the caller's is changed


def test_the_first_layer_that_differs():
    ours, theirs = Block(8, 2, epsilon=1e-3, rngs=nnx.Rngs(0)), TorchBlock(8, 2)
    comparison = compare_modules(ours, theirs, RNG.normal(size=(2, 5, 8)), dtypes=["float32"])
    assert not comparison.passed
    assert comparison.note == "the first that differs is `norm2` (LayerNorm), in PyTorch `norm2` (LayerNorm)"
    assert comparison.note in str(comparison)


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
    """One of every layer that is known."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.shift = nnx.Param(jnp.ones(6))
        self.conv1 = nnx.Conv(6, 8, (3,), feature_group_count=2, rngs=rngs)
        self.batch = nnx.BatchNorm(8, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3, 5), rngs=rngs)
        self.group = nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=rngs)
        self.rms = nnx.RMSNorm(6, epsilon=1e-5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 3, use_bias=False, rngs=rngs)])

    def __call__(self, tokens):
        x = self.batch(self.conv1(self.embed(tokens) + self.shift[...][None, None]))
        x = self.group(self.conv(x.reshape(len(x), -1, 5, 4)))
        return self.layers[0](self.rms(x.mean((1, 2))))


class TorchNet(torch.nn.Module):
    """The same, with other names."""

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


@pytest.mark.parametrize("training", [True, False])
def test_every_layer_that_is_known(training):
    ours, theirs = randomised(Net(nnx.Rngs(0))), TorchNet()
    if not training:
        ours.eval(), theirs.eval()
        ours.batch.mean[...] = jnp.asarray(RNG.normal(size=8), "float32")
        ours.batch.var[...] = jnp.asarray(RNG.uniform(1, 2, size=8), "float32")
    # the embedding is [N, L, C] in both; the outputs of Conv1d and its norm have their channels first in PyTorch
    tokens = RNG.integers(7, size=(3, 10))
    comparison = compare_modules(ours, theirs, tokens, channels_first=(4,), limits={"float32": (256, 1024)})
    layers = {x.subject.split("`")[1] for x in comparison.failures if "`" in x.subject}
    assert layers == {"conv1", "batch"}, str(comparison)
    assert all(x.problem.startswith("shape") for x in comparison.failures)


def small(*layers):
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("theirs", "error", "says"),
    [
        (small(torch.nn.Linear(3, 4), torch.nn.PReLU()), TypeError, "`1.weight`, of a PyTorch PReLU, has no twin in Flax; known are Linear"),
        (small(torch.nn.Linear(3, 5)), ValueError, r"`layers.0` \(Linear\), in PyTorch `0` \(Linear\): `0.(weight|bias)` is \[4(, 3)?\] from Flax, \[5"),
        (small(torch.nn.Linear(3, 4, bias=False)), TypeError, "of Flax has no twin `0.bias` in PyTorch"),
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
    with pytest.raises(TypeError, match=r"`layers.1.negative_slope` of Flax has no twin `layers.1.negative_slope`"):
        compare_modules(ours, small(torch.nn.Linear(3, 4)), X)


def test_a_layer_called_twice():
    layer, twice = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), torch.nn.Linear(3, 3)
    assert compare_modules(nnx.Sequential(layer, layer), small(twice, twice), X).passed
    with pytest.raises(ValueError, match="a layer must have one twin"):
        compare_modules(nnx.Sequential(layer, layer), small(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), X)
