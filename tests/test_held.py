"""What is held until the backward pass: the gradient, in the dtype of the input, and no other array of the inputs' size."""

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
SMALL = 12 * 12 * 8 * 4  # bytes: some numbers for each example and each pair of examples


def leaves(x):
    return list(x) if isinstance(x, list | tuple) else [x]


def given(f, loss, dtype, masked):
    """The inputs that learn, and a function of them."""
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
    """Two bytes an entry of an input in half precision, four of one in float32."""
    return sum(x.dtype.itemsize * math.prod(x.shape) for v in learned.values() for x in leaves(v)) + SMALL


def requiring(learned):
    for x in (x for v in learned.values() for x in leaves(v)):
        x.requires_grad_()
    return learned


@every
@dtypes
@masks
def test_saved_tensors(loss, dtype, masked):
    """What autograd holds, by its hooks: each tensor once."""
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
    """What is alive after the loss and was not before, by the allocator: nothing hides in a closure or a context."""
    learned, value = given(TORCH, loss, dtype, masked)
    value(requiring(learned)).backward()  # what is made once and kept is made
    gc.collect(1)  # the oldest objects, which are many, are not of this test
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = value(learned)
    records = [x.nbytes() for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    state = sum(x.nbytes for k, kind in loss.inputs.items() if kind.endswith("State") for x in value_state(loss, dtype))
    # a matrix that pools 21 bins of a map, one for all examples, which the second derivative would take again
    pools = sum(21 * h * w * 8 for _, h, w in SIZES.maps) if "maps" in loss.inputs.values() else 0
    assert 0 < sum(records) <= allowed(learned) + state + pools
    result.backward()


def value_state(loss, dtype):
    """Of the size of the next state: CRCD's memory, DINO's centre."""
    (inputs,) = draw(loss, SIZES, 0)
    return tuple(TORCH.arrays(inputs[loss.state], "float64" if dtype == "float64" else "float32").values())


@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if x.shift_invariant and not x.batch_coupled], ids=lambda loss: loss.title
)
@dtypes
@masks
def test_residuals(loss, dtype, masked):
    """What `jax.vjp` holds, outside of `jit`, of losses that are functions of rows; their shapes tell."""
    learned, value = given(JAX, loss, dtype, masked)
    pull = jax.eval_shape(lambda learned: jax.vjp(value, learned)[1], learned)
    assert 0 < sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(pull)) <= allowed(learned)


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if "logits" in x.inputs.values() and x.value != "array"], ids=lambda x: x.title
)
def test_small_gradients_of_float16(f, loss):
    """A loss that is multiplied, as mixed precision in float16 does, so that small gradients do not vanish: they do not."""
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
    small = np.abs(slopes["float32"]) < scale * 2.0**-16  # of which float16 has few digits before it is multiplied
    assert small.any()
    error = np.abs(slopes["float16"] - slopes["float32"])
    assert (error <= 2.0**-9 * np.abs(slopes["float32"]) + 2.0**-24).all()


@pytest.mark.parametrize("axes", [1, 2])
def test_float16_beside_what_is_not_finite(axes):
    """A number that is not finite stays what it is; the small ones of its row, or of all rows, keep their digits."""
    gradient = torch.tensor([[1e-9, math.nan, -3e-9], [2e-9, -math.inf, 1e-20], [0.0, 0.0, 0.0]])
    packed, unit = pack(gradient, torch.float16, axes)
    assert unit.numel() == (3 if axes == 1 else 1)
    assert torch.allclose(packed * unit, gradient, rtol=2**-10, atol=1e-13, equal_nan=True)
    assert packed[0, 0] * unit.flatten()[0] > 0
    assert pack(torch.zeros(0, 3), torch.float16, axes)[0].shape == (0, 3)


@pytest.mark.parametrize("loss", [x for x in LOSSES if not x.second_derivative], ids=lambda x: x.title)
def test_a_backward_pass_makes_no_zeros(loss):
    """For what has no gradient: the held gradients and the next state, which are results too."""
    learned, value = given(TORCH, loss, "float32", False)
    result = value(requiring(learned))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result.backward()
    assert not {event.name for event in profile.events()} & {"aten::zeros", "aten::new_zeros", "aten::zero_"}


@every
@dtypes
def test_a_backward_pass_writes_where_nobody_looks(loss, dtype):
    """The last one writes into what was held: not into the inputs, and not while another may follow."""
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
        limits = torch.finfo(one.dtype)  # below `tiny` numbers are as far apart as there
        assert (three - 3 * one).abs().max() <= 2 * limits.eps * max(three.abs().max(), limits.tiny)


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.leading], ids=lambda x: x.title)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_in_a_batch(loss, dtype):
    """`is_grads_batched`, of values an example."""
    (inputs,) = draw(loss, Sizes((3,)), 0)
    inputs = TORCH.arrays(inputs, dtype)
    x = inputs[loss.learns[0]].requires_grad_()
    values = per_example(TORCH.kd, loss)(**inputs, reduction="none")
    (each,) = torch.autograd.grad(values, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    (whole,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(each.sum(0), whole)


def test_the_gradient_lies_where_it_was_held():
    """So that the last backward pass takes no more memory than what is held."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y, held = torch.randn(300, 1000, dtype=dtype, requires_grad=True), torch.randn(300, 1000, dtype=dtype), []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, held=held: held.append(v.data_ptr()) or v, lambda v: v):
            TORCH.kd.kl_loss(x, y).backward()
        assert x.grad.data_ptr() in held
