"""`kdtorch.fuse`: row functions compiled once and called from eager code."""

import functools
import inspect
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from frameworks import TORCH
from tiers import first, slow
from torch.utils.flop_counter import FlopCounterMode

import kdtorch
from kdtorch import _rowwise
from parity.cases import LOSSES, Sizes, cases, draw
from parity.check import check
from parity.perturbations import PERTURBATIONS

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
# losses that are functions of rows, found by the calls in their files
CALLS = re.compile(r"\b(rowwise|by_rows|kl_divergence)\(")
OF_ROWS = [x for x in LOSSES if CALLS.search(inspect.getsource(inspect.getmodule(getattr(kdtorch, x.name))))]
EAGER, INDUCTOR = "eager", "inductor"


@pytest.fixture
def fused(monkeypatch):
    """A function that turns fusing on with a backend of `torch.compile`, and returns a counter of programs and
    graphs."""
    from torch._dynamo.utils import counters

    def start(backend):
        programs = functools.cache(_rowwise._program.__wrapped__)
        monkeypatch.setattr(_rowwise, "_program", programs)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        torch._dynamo.reset()
        counters.clear()
        kdtorch.fuse(True)
        return lambda: (programs.cache_info().currsize, counters["stats"]["unique_graphs"])

    yield start
    kdtorch.fuse("auto")
    assert not counters["graph_break"]


def given(loss, dtype="float32", sizes=None, seed=0):
    """The inputs by name; trained inputs require a gradient."""
    (inputs,) = draw(loss, sizes or Sizes(), seed)
    state = inputs.pop(loss.state, None)
    inputs = TORCH.arrays(inputs, dtype)
    if state:
        inputs[loss.state] = getattr(kdtorch, loss.inputs[loss.state])(**TORCH.arrays(state, "float32"))
    for x in learned(loss, inputs):
        x.requires_grad_()
    return inputs


def learned(loss, inputs):
    return [x for k in loss.learns for x in (inputs[k] if isinstance(inputs[k], list) else [inputs[k]])]


def evaluate(loss, inputs, **options):
    result = loss.of(kdtorch)(**inputs, **options)
    if loss.value == "array":
        return (result * torch.arange(result.numel()).cos().view_as(result)).sum()
    return result[0] if loss.state else result


def step(loss, inputs, **options):
    """The value, and the gradients."""
    value = evaluate(loss, inputs, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), learned(loss, inputs))]


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite])
        assert ((a - b)[finite].abs() <= tolerance * torch.where(finite, b, 0).abs().max()).all()


def wrong(loss, dtype, names=()):
    """The differences that exceed the limits of parity, in all cases or in some."""
    found = (x for case in cases(loss) if not names or case.name in names for x in check(case, dtype, ("torch",)))
    return [str(x) for x in found if not x.passed]


@pytest.mark.parametrize("loss", first(2, OF_ROWS), ids=lambda loss: loss.title)
def test_numbers(fused, loss):
    count = fused(EAGER)
    assert not wrong(loss, "bfloat16", ("masked",))
    assert count()[0] > 0


# known errors of compiled kernels that exceed the limit in float32
OPEN = {
    "alpha_beta_loss": "exponents of 1e-4: the gradient is 2e-5 of its largest entry off, 174 ULP",
    "taid_loss": "an interpolation of 0: a gradient of 4e-9 for 0",
}


def of_single(loss):
    why = OPEN.get(loss.name)
    return pytest.param(loss, "float32", marks=pytest.mark.xfail(reason=why, strict=True) if why else ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [of_single(x) for x in OF_ROWS]
    + [
        (x, dtype) for x in OF_ROWS if x.name in ("dkd_loss", "kl_loss") for dtype in ("float64", "bfloat16", "float16")
    ],
    ids=lambda x: x if isinstance(x, str) else x.title,
)
def test_numbers_of_compiled_kernels(fused, loss, dtype):
    """In float32, also infinite and excluded logits. A mask, a setting and a single row compile programs of their own,
    and are tested for a few losses."""
    fused(INDUCTOR)
    every = () if loss.name in ("dkd_loss", "kl_loss", *OPEN) else ("ordinary", *PERTURBATIONS)
    assert not wrong(loss, dtype, every if dtype == "float32" else ("masked",))


@pytest.mark.parametrize("name", ["crcd_loss", "crd_loss", "dcn_loss", "difference_kl_loss", "euclidean_mse_loss"])
def test_what_is_no_function_of_rows(fused, name):
    count = fused(EAGER)
    loss = next(loss for loss in LOSSES if loss.name == name)
    step(loss, given(loss))
    assert count() == (0, 0)


@pytest.mark.parametrize("name", ["linear_kl_loss", first(0, ["linear_topk_kl_loss"])[0]])
def test_logits_of_linear_heads(fused, name):
    """Their rows are compared by the compiled program."""
    count = fused(EAGER)
    loss = next(loss for loss in LOSSES if loss.name == name)
    inputs, temperature = given(loss), torch.tensor(2.0, requires_grad=True)

    def gradients():
        value = evaluate(loss, inputs, temperature=temperature)
        return [value.detach(), *torch.autograd.grad(value, [*learned(loss, inputs), temperature])]

    ours = gradients()
    assert count()[0] == 1
    kdtorch.fuse(False)
    close(ours, gradients())


@slow
def test_a_compiled_kernel(fused):
    """With PyTorch's compiler there is one program for many sizes. The only arrays of the logits' size are the
    gradient and
    p - q in float32, which the compiler stores while it sums them."""
    count = fused(INDUCTOR)
    kl = next(loss for loss in OF_ROWS if loss.name == "kl_loss")
    for batch, classes in (((8,), 8), ((64,), 3000), ((2, 3), 70)):
        inputs = given(kl, "bfloat16", Sizes(batch, classes))
        ours = step(kl, inputs, temperature=2.0)
        kdtorch.fuse(False)
        close(ours, step(kl, inputs, temperature=2.0), 2**-7)
        kdtorch.fuse(True)
    assert count() == (1, 1)

    inputs = given(kl, "bfloat16", Sizes((64,), 3000))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value = evaluate(kl, inputs)
    made = [x.nbytes() for x in profile.profiler.kineto_results.events() if x.name() == "[memory]" and x.nbytes() > 0]
    gradient = 2 * 64 * 3000
    assert max(made) == 2 * gradient
    assert sum(made) <= 3.05 * gradient
    value.backward()
    assert count() == (1, 1)


SHAPES = [((5,), 5), ((7,), 3), ((1,), 4), ((2, 3), 4), ((2,), 2), ((4, 1), 9), ((1,), 2), ((1, 1), 4), ((128,), 100)]


LEADING = [(x, masked) for x in OF_ROWS if x.leading for masked in (False, True) if x.value == "example" or not masked]


@pytest.mark.parametrize(
    ("loss", "masked"), first(2, LEADING), ids=lambda x: getattr(x, "title", "masked" if x else "all")
)
def test_at_most_two_graphs(fused, loss, masked):
    """One graph for a single row and one for several, for any sizes, numbers of axes and settings."""
    count = fused(EAGER)
    for seed, (batch, size) in enumerate(SHAPES):
        where = {"where": torch.ones(batch, dtype=torch.bool)} if masked else {}
        inputs = given(loss, "float32", Sizes(batch, size, size + 1, kept=max(size // 2, 2)), seed)
        options = {k: ends[0] + (ends[1] - ends[0]) * (seed + 1) / 12 for k, ends in loss.ranges.items()}
        ours = step(loss, inputs, **where, **options)
        kdtorch.fuse(False)
        close(ours, step(loss, inputs, **where, **options), 1e-4)
        kdtorch.fuse(True)
    programs, graphs = count()
    assert programs > 0
    assert graphs <= 2 * programs


def test_past_the_limit_of_recompilations(fused):
    """PyTorch then runs the function uncompiled."""
    fused(EAGER)
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (3, 1, 5):
            x, y = torch.randn(batch, 7, requires_grad=True), torch.randn(batch, 7)
            close([kdtorch.kl_loss(x, y)], [torch.nn.functional.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean")])  # fmt: skip


@pytest.mark.parametrize("loss", first(2, [x for x in OF_ROWS if x.second_derivative]), ids=lambda loss: loss.title)
def test_second_derivative(fused, loss):
    """The first derivative is fused, and the second one is not."""
    count = fused(EAGER)

    def curvature():
        inputs = given(loss, "float64")
        value = evaluate(loss, inputs)
        slopes = torch.autograd.grad(value, learned(loss, inputs), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in slopes), learned(loss, inputs))

    ours = curvature()
    assert count()[0] > 0
    kdtorch.fuse(False)
    close(ours, curvature(), 1e-12)


@pytest.mark.parametrize(
    "loss", first(1, [x for x in OF_ROWS if "temperature" in x.ranges]), ids=lambda loss: loss.title
)
@pytest.mark.parametrize("both", [False, True], ids=["alone", "with the student"])
def test_a_temperature_that_learns(fused, loss, both):
    count = fused(EAGER)

    def slopes():
        temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        inputs = given(loss, "float64")
        for x in () if both else learned(loss, inputs):
            x.requires_grad_(False)
        value = evaluate(loss, inputs, temperature=temperature)
        return torch.autograd.grad(value, [temperature, *(learned(loss, inputs) if both else [])])

    ours = slopes()
    assert count()[0] > 0
    kdtorch.fuse(False)
    close(ours, slopes(), 1e-12)


@pytest.mark.parametrize(
    "loss", first(1, [x for x in OF_ROWS if {"alpha", "gamma"} & set(x.ranges)]), ids=lambda x: x.title
)
def test_a_setting_that_requires_a_gradient(fused, loss):
    fused(EAGER)
    name = next(k for k in loss.ranges if k in ("alpha", "gamma"))
    number = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=f"`{name}` is a constant"):
        evaluate(loss, given(loss), **{name: number})
    ours = step(loss, given(loss), **{name: number.detach()})
    kdtorch.fuse(False)
    close(ours, step(loss, given(loss), **{name: 0.5}))


KL = next(loss for loss in OF_ROWS if loss.name == "kl_loss")


@pytest.mark.parametrize("name", ["vmap", "vmap of grad", "grads in a batch"])
def test_vmap_goes_the_ordinary_way(fused, name):
    count = fused(EAGER)
    x, y = torch.randn(4, 5, 7), torch.randn(4, 5, 7)
    if name == "vmap":
        value = torch.func.vmap(kdtorch.kl_loss)(x, y)
        assert torch.allclose(value, kdtorch.kl_loss(x, y, reduction="none").mean(-1), rtol=1e-5)
    elif name == "vmap of grad":
        slope = torch.func.vmap(torch.func.grad(kdtorch.kl_loss))(x, y)
        close([slope], [step(KL, {"student_logits": x.requires_grad_(), "teacher_logits": y})[1] * 4])
        return
    else:
        leaf = x[0].detach().requires_grad_()
        values = kdtorch.kl_loss(leaf, y[0], reduction="none")
        (slopes,) = torch.autograd.grad(values, leaf, torch.eye(5), is_grads_batched=True, retain_graph=True)
        (whole,) = torch.autograd.grad(values.sum(), leaf)
        close([slopes.sum(0)], [whole])
    assert count()[0] <= 1


def test_grad_of_torch_func(fused):
    fused(EAGER)
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    ours = torch.func.grad(kdtorch.kl_loss)(x, y)
    kdtorch.fuse(False)
    close([ours], [torch.func.grad(kdtorch.kl_loss)(x, y)])


def test_under_torch_compile_nothing_is_compiled_twice(fused):
    """A compiled function is not compiled again when the setting changes, either."""
    programs = fused(EAGER)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = functools.partial(torch.compile).func(kdtorch.kl_loss, backend=counter, fullgraph=True)
    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    for setting in (True, False, "auto"):
        kdtorch.fuse(setting)
        compiled(x, y).backward()
    assert counter.frame_count == 1
    assert programs()[0] == 0


class Mine(torch.Tensor):
    pass


ODD = {
    "a subclass": lambda x, y: kdtorch.kl_loss(x.as_subclass(Mine), y),
    "another subclass": lambda x, y: kdtorch.kl_loss(x, y.as_subclass(Mine)),
    "a dispatch mode": lambda x, y: _under(FlopCounterMode(display=False), x, y),
    "no data": lambda x, y: kdtorch.kl_loss(x.to("meta"), y.to("meta")),
    "no rows": lambda x, y: kdtorch.kl_loss(x[:0], y[:0]),
    "one row without a batch": lambda x, y: kdtorch.kl_loss(x[0], y[0]),
}


def _under(mode, x, y):
    with mode:
        return kdtorch.kl_loss(x, y)


@pytest.mark.parametrize("name", ODD)
def test_what_goes_the_ordinary_way(fused, name):
    count = fused(EAGER)
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    ours = ODD[name](x, y)
    assert count() == (0, 0)
    kdtorch.fuse(False)
    assert ours.is_meta or torch.equal(ours, ODD[name](x, y))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "a broadcast mask"])
def test_logits_that_lie_otherwise_in_memory(fused, layout):
    fused(EAGER)
    x, y, where = torch.randn(3, 6, 7), torch.randn(3, 6, 7), None
    if layout == "sliced":
        x, y = x[:, :-1], y[:, 1:]
    elif layout == "transposed":
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    elif layout == "expanded":
        y = y[:1].expand(3, 6, 7)
    else:
        where = torch.tensor([True, True, False, True, True, True]).expand(3, 6)
    x = x.requires_grad_()

    def slopes():
        value = kdtorch.kl_loss(x, y, where=where, reduction="none")
        return [value.detach(), *torch.autograd.grad(value.sum(), x)]

    ours = slopes()
    kdtorch.fuse(False)
    close(ours, slopes())


def test_a_teacher_of_inference_mode(fused):
    fused(EAGER)
    x = torch.randn(5, 7, requires_grad=True)
    with torch.inference_mode():
        y = torch.randn(5, 7)
        inside = kdtorch.kl_loss(x, y)
    ours = [inside.clone(), kdtorch.kl_loss(x, y)]
    kdtorch.fuse(False)
    close(ours, [kdtorch.kl_loss(x, y)] * 2)


def test_values_may_be_written_into(fused):
    fused(EAGER)
    x, y = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    kdtorch.kl_loss(x, y, reduction="none").add_(1).sum().backward()
    kdtorch.kl_loss(x.detach(), y, reduction="none").add_(1)


def test_autocast(fused):
    fused(EAGER)
    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    with torch.autocast("cpu"):
        ours = kdtorch.kl_loss(x, y)
    close([ours], [kdtorch.kl_loss(x, y)])


def test_settings(monkeypatch, fused):
    assert kdtorch.fuse(False) == "auto"
    assert kdtorch.fuse(True) is False
    assert kdtorch.fuse("auto") is True
    for setting in ("on", 1, None):
        with pytest.raises(ValueError, match=r'`setting` must be one of True, False, "auto", got '):
            kdtorch.fuse(setting)
    count = fused(EAGER)
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    kdtorch.fuse("auto")  # off, because no device has been measured
    assert not _rowwise._AUTO
    kdtorch.kl_loss(x, y)
    assert count() == (0, 0)
    monkeypatch.setattr(_rowwise, "_AUTO", {"cpu"})
    monkeypatch.setattr(_rowwise, "has_triton", lambda: False)
    kdtorch.kl_loss(x, y)
    assert count() == (0, 0)
    monkeypatch.setattr(_rowwise, "has_triton", lambda: True)
    kdtorch.kl_loss(x, y)
    assert count() == (1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    first(1, [("1", "True"), ("auto", "auto"), ("yes", "KDLOSSES_FUSE must be one of 1, 0, auto, got")]),
)
def test_environment(text, says):
    code = "import kdtorch; print(kdtorch.fuse(False))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"KDLOSSES_FUSE": text},
    )
    assert says in (done.stderr if text == "yes" else done.stdout)
    assert np.sign(done.returncode) == (text == "yes")
