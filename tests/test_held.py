"""Until the backward pass only the gradient is stored, in the input's dtype, and no other array of the inputs' size."""

import gc
import math

import jax
import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH
from tiers import first, only

from kdtorch._numerics import pack
from parity.calls import masked_axes, per_example
from parity.cases import LOSSES, MAPS, Case, Sizes, draw, each_array

every = pytest.mark.parametrize(
    "loss", [x for x in LOSSES if x.learns], ids=lambda loss: str(Case(loss, "", ())).rstrip("-")
)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
SIZES = Sizes((12,), 3000, 1000, 4, 2, ((6, 16, 17), (5, 13, 14)), 40, 5, kept=16)
KEPT = np.arange(12) % 3 > 0
SMALL = 12 * 12 * 8 * 4  # bytes, for a few numbers per example and per pair of examples


def leaves(x):
    return list(x) if isinstance(x, list | tuple) else [x]


def given(f, loss, dtype, masked):
    """The trained inputs, and a function of them."""
    (inputs,) = draw(loss, SIZES, 0)
    maps = {k: inputs[k] for k, kind in loss.inputs.items() if kind in MAPS and f is JAX}
    inputs |= each_array(maps, lambda x: np.moveaxis(x, 1, -1))
    state = inputs.pop(loss.state, None)
    inputs = f.arrays(inputs, dtype)
    if state:
        state = f.arrays(state, "float64" if dtype == "float64" else "float32")
        inputs[loss.state] = getattr(f.kd, loss.inputs[loss.state])(**state)
    if loss.value == "array" and masked:
        pytest.skip("it knows no mask")
    options = {"where": f.array(KEPT)} if masked else {}

    function = per_example(f.kd, loss) if masked_axes(loss) else loss.of(f.kd)

    def value(learned):
        result = function(**{**inputs, **learned}, **options)
        return result[0] if loss.state else result.sum()

    return {k: inputs[k] for k in loss.learns}, value


def allowed(learned):
    """The bytes that may be stored: one entry in the input's dtype for each entry of an input."""
    return sum(x.dtype.itemsize * math.prod(x.shape) for v in learned.values() for x in leaves(v)) + SMALL


def requiring(learned):
    for x in (x for v in learned.values() for x in leaves(v)):
        x.requires_grad_()
    return learned


@every
@dtypes
@masks
def test_saved_tensors(loss, dtype, masked):
    """The tensors that autograd stores, found by its hooks, each counted once."""
    learned, value = given(TORCH, loss, dtype, masked)
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = value(requiring(learned))
    assert 0 < sum(held.values()) <= allowed(learned)
    result.backward()


@every
@pytest.mark.parametrize(
    ("dtype", "masked"),
    only(
        lambda form: form == ("bfloat16", True),
        [(dtype, masked) for dtype in ("float32", "bfloat16", "float16", "float64") for masked in (False, True)],
    ),
)
def test_memory_that_was_not_freed(loss, dtype, masked):
    """The allocator's memory that the loss adds and keeps, so that nothing is hidden in a closure or a context."""
    learned, value = given(TORCH, loss, dtype, masked)
    value(requiring(learned)).backward()  # create everything that is cached
    gc.collect(1)  # without the oldest objects, which are many
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = value(learned)
    records = [x.nbytes() for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    state = sum(x.nbytes for k, kind in loss.inputs.items() if kind.endswith("State") for x in value_state(loss, dtype))
    # the matrix that pools a map into 21 bins, which is stored for the second derivative
    pools = sum(21 * h * w * 8 for _, h, w in SIZES.maps) if "maps" in loss.inputs.values() else 0
    assert 0 < sum(records) <= allowed(learned) + state + pools
    result.backward()


def value_state(loss, dtype):
    """Arrays of the size of the next state, such as CRCD's memory and DINO's centre."""
    (inputs,) = draw(loss, SIZES, 0)
    return tuple(TORCH.arrays(inputs[loss.state], "float64" if dtype == "float64" else "float32").values())


@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if x.shift_invariant and not x.batch_coupled], ids=lambda loss: loss.title
)
@dtypes
@masks
def test_residuals(loss, dtype, masked):
    """The arrays that `jax.vjp` stores outside of `jit`, by their shapes, for losses that are functions of rows."""
    learned, value = given(JAX, loss, dtype, masked)
    pull = jax.eval_shape(lambda learned: jax.vjp(value, learned)[1], learned)
    assert 0 < sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(pull)) <= allowed(learned)


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if "logits" in x.inputs.values() and x.value != "array"], ids=lambda x: x.title
)
def test_small_gradients_of_float16(f, loss):
    """They do not underflow if the loss is scaled, as in mixed precision with float16."""
    scale = 2.0**10
    slopes = {}
    for dtype in ("float16", "float32"):
        (inputs,) = draw(loss, Sizes((3,), 400), 1)
        inputs = f.arrays(
            {k: v.astype(np.float16).astype(np.float64) if v.dtype.kind == "f" else v for k, v in inputs.items()}, dtype
        )
        first = loss.learns[0]

        def value(x, inputs=inputs, first=first):
            return per_example(f.kd, loss)(**{**inputs, first: x}).sum() * scale

        slopes[dtype] = f.numpy(f.grad(value)(inputs[first])).astype(np.float64)
    small = np.abs(slopes["float32"]) < scale * 2.0**-16  # float16 has few digits for these before the scaling
    assert small.any()
    error = np.abs(slopes["float16"] - slopes["float32"])
    assert (error <= 2.0**-9 * np.abs(slopes["float32"]) + 2.0**-24).all()


@pytest.mark.parametrize("axes", [1, 2])
def test_float16_beside_what_is_not_finite(axes):
    """An entry that is not finite stays as it is; small entries of its row, or of all rows, keep their digits."""
    gradient = torch.tensor([[1e-9, math.nan, -3e-9], [2e-9, -math.inf, 1e-20], [0.0, 0.0, 0.0]])
    packed, unit = pack(gradient, torch.float16, axes)
    assert unit.numel() == (3 if axes == 1 else 1)
    assert torch.allclose(packed * unit, gradient, rtol=2**-10, atol=1e-13, equal_nan=True)
    assert packed[0, 0] * unit.flatten()[0] > 0
    assert pack(torch.zeros(0, 3), torch.float16, axes)[0].shape == (0, 3)


@pytest.mark.parametrize("loss", [x for x in LOSSES if not x.second_derivative], ids=lambda x: x.title)
def test_a_backward_pass_makes_no_zeros(loss):
    """No zeros are created as gradients of outputs without one: the stored gradients and the next state."""
    learned, value = given(TORCH, loss, "float32", False)
    result = value(requiring(learned))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result.backward()
    assert not {event.name for event in profile.events()} & {"aten::zeros", "aten::new_zeros", "aten::zero_"}


@every
@dtypes
def test_a_backward_pass_writes_where_nobody_looks(loss, dtype):
    """Only the last backward pass overwrites what was stored; it never overwrites the inputs."""
    learned, value = given(TORCH, loss, dtype, True)
    inputs = [x for v in requiring(learned).values() for x in leaves(v)]
    before = [x.detach().clone() for x in inputs]
    result = value(learned)
    first = torch.autograd.grad(result, inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * result, inputs, retain_graph=True)
    result.backward()
    for x, old, one, copy, three in zip(inputs, before, first, kept, second, strict=True):
        assert torch.equal(x, old)
        assert torch.equal(one, copy)
        assert torch.equal(x.grad, one)
        limits = torch.finfo(one.dtype)  # below `tiny` the spacing of numbers is constant
        assert (three - 3 * one).abs().max() <= 2 * limits.eps * max(three.abs().max(), limits.tiny)


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.leading], ids=lambda x: x.title)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_in_a_batch(loss, dtype):
    """`is_grads_batched` with one value per example."""
    (inputs,) = draw(loss, Sizes((3,)), 0)
    inputs = TORCH.arrays(inputs, dtype)
    x = inputs[loss.learns[0]].requires_grad_()
    values = per_example(TORCH.kd, loss)(**inputs, reduction="none")
    (each,) = torch.autograd.grad(values, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    (whole,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(each.sum(0), whole)


def test_the_gradient_lies_where_it_was_held():
    """So the last backward pass needs no memory in addition to what is stored."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y, held = torch.randn(300, 1000, dtype=dtype, requires_grad=True), torch.randn(300, 1000, dtype=dtype), []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, held=held: held.append(v.data_ptr()) or v, lambda v: v):
            TORCH.kd.kl_loss(x, y).backward()
        assert x.grad.data_ptr() in held
