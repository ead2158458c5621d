"""What the losses hold: no array that the contract does not name. Asked of the compiler and the profiler, not of the clock."""

import itertools
import math
import re

import jax
import pytest
import torch

import kdjax
import kdtorch
from parity.cases import LOSSES

B, C, D, K, N = 96, 700, 64, 300, 4000
VIEWS, WIDTH = 6, 3000
LOGITS = {"student": (B, C), "teacher": (B, C)}
FEATURES = {"student": (B, D), "teacher": (B, D)}
BANK = {"student_memory": (N, D), "teacher_memory": (N, D), "student_normalizer": (), "teacher_normalizer": ()}
MAPS = [(B, 12, 12, 20)]

# the shapes of the inputs, the entries of the largest array that there may be, each of four bytes, and how many of that size
# JAX and PyTorch may hold at once
CASES = {
    "kl_loss": (LOGITS, B * C, 5, 7),
    "symmetric_kl_loss": (LOGITS, B * C, 5, 9),
    "dkd_loss": ({**LOGITS, "labels": (B,)}, B * C, 5, 8),
    "nkd_loss": ({**LOGITS, "labels": (B,)}, B * C, 7, 8),
    "uskd_loss": ({**LOGITS, "labels": (B,)}, 2 * B * C, 12, 7),  # places are int64
    "topk_kl_loss": ({"student": (B, C), "values": (B, 64), "indices": (B, 64), "rest": (B,)}, B * C, 2, 4),
    "difference_kl_loss": (LOGITS, 2 * (B * B + B * C), 10, 10),  # float64
    "bce_loss": (FEATURES, B * D, 4, 3),
    "mse_loss": (FEATURES, B * D, 1, 3),
    "smooth_l1_loss": (FEATURES, B * D, 3, 5),
    "hcl_loss": ({"student": MAPS, "teacher": MAPS}, B * 12 * 12 * 20, 1, 4),
    "dcn_loss": ({"student": (B, 8), "teacher": (B, 8), "labels": (B,), "centers": (N, 8)}, B * 8 + N * 8, 1, 2),
    "euclidean_mse_loss": (FEATURES, B * B + B * D, 5, 6),
    "crcd_loss": ({**FEATURES, "index": (B,), "negatives": (B, K), "state": BANK}, B * K * 8 + N * D * 2, 1, 5),
    "dino_loss": ({"student": (VIEWS, B, WIDTH), "teacher": (2, B, WIDTH), "state": {"center": (WIDTH,)}}, VIEWS * B * WIDTH, 2, 3),
}  # fmt: skip


def inputs(package, name, number, index):
    def of(key, shape):
        if isinstance(shape, list):
            return [number(x) for x in shape]
        if isinstance(shape, dict):
            state = {"dino_loss": package.DINOState, "crcd_loss": package.CRCDState}[name]
            return state(**{field: number(x) for field, x in shape.items()})
        return (index if key in ("labels", "index", "indices", "negatives") else number)(shape)

    return [of(key, shape) for key, shape in CASES[name][0].items()]


def value(package, name, given):
    result = getattr(package, name)(*given)
    return result[0] if type(result) is tuple else result


def learned(name):
    """The places of the inputs whose gradient is taken."""
    loss = next(x for x in LOSSES if x.name == name)
    return tuple(i for i, k in enumerate(loss.inputs) if k in loss.learns)


def test_every_loss_is_here():
    assert set(CASES) == {loss.name for loss in LOSSES}


@pytest.mark.parametrize("name", CASES)
def test_jax(name):
    _, entries, arrays, _ = CASES[name]
    with jax.enable_x64(False):
        given = inputs(kdjax, name, *(lambda shape, d=d: jax.ShapeDtypeStruct(shape, d) for d in ("float32", "int32")))
        step = jax.value_and_grad(lambda *given: value(kdjax, name, given), learned(name))
        program = jax.jit(step).lower(*given).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 4 * entries * arrays
    shapes = re.findall(r"\w\[([\d,]+)\]", program.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) <= entries


# difference_kl goes three ways, by the span of its logits
SCALES = [(name, 1.0) for name in CASES] + [("difference_kl_loss", 30.0), ("difference_kl_loss", 1000.0)]


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_torch(name, scale):
    _, entries, _, arrays = CASES[name]
    given = inputs(kdtorch, name, lambda shape: scale * torch.randn(shape), lambda shape: torch.randint(7, shape))
    leaves = [x for i in learned(name) for x in (given[i] if isinstance(given[i], list) else [given[i]])]
    for x in leaves:
        x.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value(kdtorch, name, given).backward()
    records = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = [x.nbytes() for x in sorted(records, key=lambda x: x.start_ns())]  # below 0 where memory is freed
    assert 4 * leaves[0].numel() <= max(changes) <= 4 * entries  # the gradient at least
    assert max(itertools.accumulate(changes)) <= 4 * entries * arrays


@pytest.mark.parametrize(("temperature", "most"), [(1.0, 14), (4.0, 14), (3.0, 16)])
@pytest.mark.parametrize("shape", [(128, 10), (128, 1000)], ids=str)
def test_kernels_of_kl(shape, temperature, most):
    """In eager PyTorch each kernel over the logits is a barrier for its threads: at most 14, forward and backward.

    A division by T that rounds, where T is no power of 2, takes two more: the largest logit is taken off first.
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
