"""What is held until the backward pass: the gradient, in the dtype of the input, and no other array of the inputs' size."""

import gc
import math

import jax
import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH

from parity.cases import LOSSES, Case, Sizes, draw

every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(Case(loss, "", ())).rstrip("-"))
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
    maps = [k for k, kind in loss.inputs.items() if kind == "maps" and f is JAX]
    inputs |= {k: [np.moveaxis(x, 1, -1) for x in inputs[k]] for k in maps}
    state = inputs.pop(loss.state, None)
    inputs = f.arrays(inputs, dtype)
    if state:
        state = f.arrays(state, "float64" if dtype == "float64" else "float32")
        inputs[loss.state] = getattr(f.kd, loss.inputs[loss.state])(**state)
    where = f.array(KEPT) if masked else None

    def value(learned):
        result = loss.of(f.kd)(**{**inputs, **learned}, where=where)
        return result[0] if loss.state else result

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
@dtypes
@masks
def test_memory_that_was_not_freed(loss, dtype, masked):
    """What is alive after the loss and was not before, by the allocator: nothing hides in a closure or a context."""
    learned, value = given(TORCH, loss, dtype, masked)
    value(requiring(learned)).backward()  # what is made once and kept is made
    gc.collect()
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
    "loss", [x for x in LOSSES if x.shift_invariant and x.name != "difference_kl_loss"], ids=lambda loss: loss.title
)
@dtypes
@masks
def test_residuals(loss, dtype, masked):
    """What `jax.vjp` holds, outside of `jit`, of losses that are functions of rows; their shapes tell."""
    learned, value = given(JAX, loss, dtype, masked)
    pull = jax.eval_shape(lambda learned: jax.vjp(value, learned)[1], learned)
    assert 0 < sum(x.dtype.itemsize * math.prod(x.shape) for x in jax.tree.leaves(pull)) <= allowed(learned)


@pytest.mark.parametrize("f", [JAX, TORCH], ids=lambda f: f.name)
@pytest.mark.parametrize("loss", [x for x in LOSSES if "logits" in x.inputs.values()], ids=lambda x: x.title)
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
            return loss.of(f.kd)(**{**inputs, first: x}).sum() * scale

        slopes[dtype] = f.numpy(f.grad(value)(inputs[first])).astype(np.float64)
    small = np.abs(slopes["float32"]) < scale * 2.0**-16  # of which float16 has few digits before it is multiplied
    assert small.any()
    error = np.abs(slopes["float16"] - slopes["float32"])
    assert (error <= 2.0**-9 * np.abs(slopes["float32"]) + 2.0**-24).all()
