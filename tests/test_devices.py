"""n devices give the numbers of one: every loss of the table, sharded by the compiler and inside `shard_map`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kdjax
from parity.cases import KINDS, LOSSES, Sizes, along, draw, each_array
from parity.compare import ulps

SIZES = Sizes(batch=(16,), classes=8, dim=6, num_data=32, negatives=5)
STEPS = 3
# the mask of device 0 keeps one, that of device 3 none
UNEVEN = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1], bool)
LAYOUTS = {kind: P(*[None] * k.axis, "batch") if k.axis is not None else P() for kind, k in KINDS.items()}

every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
masks = pytest.mark.parametrize("where", [None, UNEVEN], ids=["all", "uneven"])


def mesh(*shape):
    return jax.make_mesh(shape, ("batch", "classes")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def given(loss, where=None, seed=0):
    """The inputs of each step, in JAX, with NaN under the mask; the state apart."""
    steps = draw(loss, SIZES, seed, STEPS if loss.state else 1)
    if where is not None:

        def poison(x, axis):
            hide = np.moveaxis(np.broadcast_to(~where, np.moveaxis(x, axis, -1).shape), -1, axis)
            return np.where(hide, np.nan, x) if x.dtype.kind == "f" else x

        steps = [along(loss, inputs, poison) for inputs in steps]
    maps = {k for k, kind in loss.inputs.items() if kind == "maps"}
    steps = [
        each_array({k: [np.moveaxis(x, 1, -1) for x in v] if k in maps else v for k, v in inputs.items()}, jnp.asarray)
        for inputs in steps
    ]
    steps = jax.tree.map(lambda x: x.astype("int32") if x.dtype.kind == "i" else x, steps)
    fields = steps[0].pop(loss.state, None)
    return steps, fields and getattr(kdjax, loss.inputs[loss.state])(**fields)


def objective(loss, options, learned, fixed, state, where):
    """The loss, and the next state."""
    inputs = {**learned, **fixed, **({loss.state: state} if loss.state else {})}
    value = getattr(kdjax, loss.name)(*(inputs[k] for k in loss.inputs), where=where, **options)
    return value if loss.state else (value, None)


def split(loss, inputs):
    learned = {k: inputs[k] for k in loss.learns}
    return learned, {k: v for k, v in inputs.items() if k not in learned}


def layouts(loss, names):
    return {k: LAYOUTS[loss.inputs[k]] for k in names}


@functools.cache
def alone(title, masked):
    """On one device: values, gradients and states of the steps."""
    loss, where = next(x for x in LOSSES if x.title == title), UNEVEN if masked else None
    steps, state = given(loss, where)
    step = jax.jit(jax.value_and_grad(functools.partial(objective, loss, {}), has_aux=True))
    results = []
    for inputs in steps:
        (value, state), gradients = step(*split(loss, inputs), state, where)
        results.append((value, gradients, state))
    return results


def agree(got, want, limit=(64, 256, 64)):
    for (value, gradients, state), (value_, gradients_, state_) in zip(got, want, strict=True):
        assert ulps(value, value_, "float64") <= limit[0]
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_), strict=True):
            assert ulps(a, b, "float64") <= limit[1]
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_), strict=True):
            assert ulps(a, b, "float64") <= limit[2]


@every
@masks
@pytest.mark.parametrize("vma", [True, False])
def test_inside_shard_map(loss, where, vma):
    """The mean over devices is the loss of the whole batch, gradients too; every device has the same state, to the bit."""
    devices = mesh(8)
    steps, state = given(loss, where)
    learned, fixed = split(loss, steps[0])

    def local(learned, fixed, state, where):
        def mean(learned):
            value, after = objective(loss, {"axis_name": "batch"}, learned, fixed, state, where)
            return jax.lax.pmean(value, "batch"), after

        (value, state), gradients = jax.value_and_grad(mean, has_aux=True)(learned)
        if not vma:  # there, the sum over devices is differentiated
            gradients = {
                k: jax.tree.map(lambda x: x / 8, g)
                if KINDS[loss.inputs[k]].axis is not None
                else jax.lax.pmean(g, "batch")
                for k, g in gradients.items()
            }
        every_state = jax.tree.map(lambda x: jax.lax.pcast(x, "batch", to="varying")[None] if vma else x[None], state)
        return value, gradients, state, every_state

    specs = (layouts(loss, learned), layouts(loss, fixed), P(), None if where is None else P("batch"))
    step = jax.jit(
        jax.shard_map(local, mesh=devices, in_specs=specs, out_specs=(P(), specs[0], P(), P("batch")), check_vma=vma)
    )
    results = []
    for inputs in steps:
        value, gradients, state, every_state = step(*split(loss, inputs), state, where)
        for x in jax.tree.leaves(every_state):
            x = np.asarray(x)
            assert (x == x[:1]).all()
        results.append((value, gradients, state))
    agree(results, alone(loss.title, where is not None))
