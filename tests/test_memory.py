"""The memory of the losses: no array that the row does not allow, measured by the compiler and the profiler."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiers import one_of_a_kind

import kdjax
import kdtorch
from kdlosses.trees import leaves
from parity.calls import per_example
from parity.cases import LOSSES, MAPS, draw, each_array
from parity.row import MEMORY_SIZES


def sizes(loss):
    return dataclasses.replace(MEMORY_SIZES, **loss.memory.sizes)


def given(loss, package, array):
    """The inputs in float32, with the state in the package's own type."""
    (inputs,) = draw(loss, sizes(loss), 0)
    inputs = each_array(inputs, lambda x: array(x.astype(np.float32) if x.dtype.kind == "f" else x))
    if loss.state:
        inputs[loss.state] = getattr(package, loss.inputs[loss.state])(**inputs[loss.state])
    return inputs


def largest(loss):
    """The number of entries of the largest array that is allowed."""
    if loss.memory.largest:
        return loss.memory.largest(sizes(loss))
    (inputs,) = draw(loss, sizes(loss), 0)
    return max(x.size for x in leaves(inputs).values())


def value(loss, package, inputs):
    result = per_example(package, loss)(**inputs)
    return result[0] if loss.state else result


every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)


@pytest.mark.parametrize("loss", one_of_a_kind(LOSSES), ids=lambda loss: loss.title)
def test_jax(loss):
    maps = [k for k, kind in loss.inputs.items() if kind in MAPS]
    with jax.enable_x64(False):
        inputs = given(loss, kdjax, jnp.asarray)
        inputs |= each_array({k: inputs[k] for k in maps}, lambda x: jnp.moveaxis(x, 1, -1))
        free = {k: inputs.pop(k) for k in loss.learns}
        step = jax.value_and_grad(lambda free, fixed: value(loss, kdjax, {**free, **fixed}))
        program = jax.jit(step).lower(free, inputs).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 4 * largest(loss) * loss.memory.jax
    shapes = re.findall(r"\w\[([\d,]+)\]", program.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) <= largest(loss)


@pytest.mark.parametrize(
    ("loss", "factor"),
    [(loss, factor) for loss in LOSSES for factor in loss.memory.factors],
    ids=lambda x: getattr(x, "title", x),
)
def test_torch(loss, factor):
    inputs = given(loss, kdtorch, torch.from_numpy)
    for x in (learned := list(leaves({k: inputs[k] for k in loss.learns}).values())):
        x.mul_(factor).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = value(loss, kdtorch, inputs)
        if learned:
            result.backward()
    records = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(records, key=lambda x: x.start_ns())]  # negative if memory is freed
    least = 4 * next(iter(learned or leaves(inputs).values())).numel()  # the gradient, or the result
    assert least <= max(changes) <= 4 * largest(loss)
    assert max(itertools.accumulate(changes)) <= 4 * largest(loss) * loss.memory.torch


@pytest.mark.parametrize(("temperature", "most"), [(1.0, 14), (4.0, 14), (3.0, 16)])
@pytest.mark.parametrize("shape", [(128, 10), (128, 1000)], ids=str)
def test_kernels_of_kl(shape, temperature, most):
    """At most 14 kernels over the logits, forward and backward; in eager PyTorch each is a barrier for its threads.

    If T is not a power of 2, the division by T rounds and needs two more, because the largest logit is subtracted
    first.
    """
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    kdtorch.kl_loss(student, teacher, temperature=temperature).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        kdtorch.kl_loss(student, teacher, temperature=temperature).backward()
    views = {"aten::as_strided", "aten::detach", "aten::reshape", "aten::to", "aten::unsqueeze", "aten::view"}
    kernels = [
        event.name
        for event in profile.events()
        if event.name.startswith("aten::")
        and event.name not in views
        and list(shape) in event.input_shapes
        and (event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::"))
    ]
    assert 8 <= len(kernels) <= most, kernels
