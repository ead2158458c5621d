"""Difficult cases for divergences of logits: ends of beta, infinite logits, ties, close rows, and rows that are far
apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH
from tiers import first, slow

from parity.calls import per_example
from parity.cases import LOSSES, Sizes, draw
from parity.compare import ulps


def _slope_and_values(function, has_aux):
    """Like `torch.func.grad`, but in eager PyTorch, which has separate code on a CPU."""

    def slope(x, *others):
        x = x.clone().requires_grad_()
        total, values = function(x, *others)
        return torch.autograd.grad(total, x)[0], values

    return slope


EAGER = dataclasses.replace(TORCH, name="eager torch", grad=_slope_and_values)
both = pytest.mark.parametrize("f", first(1, [EAGER, TORCH, JAX]), ids=lambda f: f.name)
SETTINGS = [
    ("kl_loss", {}),
    ("reverse_kl_loss", {}),
    ("reverse_kl_loss", {"temperature": 3.0}),
    ("symmetric_kl_loss", {}),
    ("jsd_loss", {}),
    ("jsd_loss", {"beta": 0.1}),
    ("jsd_loss", {"beta": 0.99, "temperature": 3.0}),
    ("jsd_loss", {"beta": 0.01}),
    ("jsd_loss", {"beta": 0.0}),
    ("jsd_loss", {"beta": 1.0}),
    ("tvd_loss", {}),
]
every = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: x if isinstance(x, str) else str(x))
NAN, INF = np.nan, np.inf


def value_and_slope(f, name, student, teacher, dtype="float64", **settings):
    """The value of each row, and the gradient of their sum."""

    def total(x, teacher):
        values = getattr(f.kd, name)(x, teacher, reduction="none", **settings)
        return values.sum(), values

    # the teacher is an argument, so that JAX's cache on disk has the program for other numbers too
    slope, values = f.jit(f.grad(total, has_aux=True))(f.array(student, dtype), f.array(teacher, dtype))
    return f.numpy(values), f.numpy(slope)


def exact(name, student, teacher, temperature=1.0, beta=0.5):
    """The exact result in 80 bits, with series where a difference of large numbers would have few digits."""
    x, y = (np.asarray(z, np.longdouble) / temperature for z in (student, teacher))
    log_p, log_q = (z - z.max(-1, keepdims=True) for z in (x, y))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_p, log_q))
    p, q = np.exp(log_p), np.exp(log_q)

    def pulled_back(h):
        return p * (h - (p * h).sum(-1, keepdims=True)) / temperature

    if name == "tvd_loss":
        return np.abs(p - q).sum(-1) / 2, pulled_back(np.sign(p - q)) / 2
    kl, reverse = (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
    square = temperature**2
    found = {
        "kl_loss": (square * kl, square * (p - q) / temperature),
        "reverse_kl_loss": (square * reverse, square * pulled_back(log_p - log_q)),
    }
    found["symmetric_kl_loss"] = tuple((a + b) / 2 for a, b in zip(*found.values(), strict=True))
    if name != "jsd_loss":
        return found[name]
    if beta in (0, 1):
        return tuple(v / square for v in found["reverse_kl_loss" if beta else "kl_loss"])
    log_m = np.logaddexp(np.log(np.longdouble(beta)) + log_q, np.log1p(-np.longdouble(beta)) + log_p)
    value = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)
    return value, (1 - beta) * pulled_back(log_p - log_m)


@both
@every
@pytest.mark.parametrize("classes", [10, 1000])
def test_float32_keeps_its_digits_where_rows_nearly_agree(f, name, settings, classes):
    """Value and gradient are within 16 ULP of the exact numbers, for logits that differ by 1 down to 1e-4."""
    rng = np.random.default_rng(0)
    for apart in (1.0, 0.1, 1e-2, 1e-3, 1e-4):
        teacher = (3 * rng.normal(size=(4, classes))).astype(np.float32)
        student = (teacher + apart * rng.normal(size=teacher.shape)).astype(np.float32)
        got = value_and_slope(f, name, student, teacher, "float32", **settings)
        for part, want in zip(got, exact(name, student, teacher, **settings), strict=True):
            assert ulps(part, want.astype(np.float64), "float32") <= 16, apart


@both
@every
@pytest.mark.parametrize(("classes", "scale"), [(4000, 3.0), (1000, 6.0), (100, 8.0)])
def test_float32_keeps_its_digits_where_rows_are_far_apart(f, name, settings, classes, scale):
    """In each row, also if the gradient nearly vanishes because the two have hardly any class in common."""
    rng = np.random.default_rng(1)
    teacher, student = ((scale * rng.normal(size=(6, classes))).astype(np.float32) for _ in range(2))
    value, slope = value_and_slope(f, name, student, teacher, "float32", **settings)
    want, want_slope = (x.astype(np.float64) for x in exact(name, student, teacher, **settings))
    assert ulps(value, want, "float32") <= 16
    for row, want_row in zip(slope, want_slope, strict=True):
        assert ulps(row, want_row, "float32") <= 32


@both
@every
def test_rows_that_agree(f, name, settings):
    rng = np.random.default_rng(2)
    logits = 30 * rng.normal(size=(5, 7))
    for dtype in ("float64", "float32"):
        value, slope = value_and_slope(f, name, logits, logits, dtype, **settings)
        assert (value == 0).all()
        assert np.abs(slope).max() <= 1e-15


@both
@every
def test_infinite_logits(f, name, settings):
    """A class at -inf in both contributes nothing, in one it is infinite if the divergence is; nothing is NaN."""
    student, teacher = np.array([[2.0, 0.0, -1.0, 0.5]] * 4), np.array([[1.0, 1.0, -1.0, 0.0]] * 4)
    student[[1, 3], 2] = teacher[[2, 3], 2] = -INF  # rows: in none, in the student, in the teacher, in both
    for dtype in ("float64", "float32"):
        value, slope = value_and_slope(f, name, student, teacher, dtype, **settings)
        beta = settings.get("beta", 0.5)
        forward = name in ("kl_loss", "symmetric_kl_loss") or (name == "jsd_loss" and beta == 0)
        reverse = name in ("reverse_kl_loss", "symmetric_kl_loss") or (name == "jsd_loss" and beta == 1)
        assert np.array_equal(np.isposinf(value), [False, forward, reverse, False])
        assert not np.isnan(value).any()
        assert np.isfinite(slope).all()
        assert not slope[[1, 3], 2].any() or forward
        if reverse:  # the gradient leads away from the class that the teacher excludes
            assert slope[2, 2] > 0
        left = [0, 1, 3]
        alone = value_and_slope(f, name, student[3:, left], teacher[3:, left], dtype, **settings)
        assert ulps(value[3:], alone[0], dtype) <= 16
        assert ulps(slope[3:, left], alone[1], dtype) <= 16


@both
def test_no_class_in_common(f):
    """The values are the upper bounds: the entropy of (beta, 1 - beta), and 1."""
    student, teacher = np.array([[0.0, 1.0, -INF, -INF]]), np.array([[-INF, -INF, 0.0, 1.0]])
    for beta in (0.01, 0.1, 0.5, 0.9):
        value, slope = value_and_slope(f, "jsd_loss", student, teacher, beta=beta)
        assert value == pytest.approx(-beta * np.log(beta) - (1 - beta) * np.log(1 - beta), rel=1e-14)
        assert np.abs(slope).max() <= 1e-15
    value, slope = value_and_slope(f, "tvd_loss", student, teacher)
    assert value == 1
    assert np.abs(slope).max() <= 1e-15
    for name, settings in (
        ("kl_loss", {}),
        ("reverse_kl_loss", {}),
        ("jsd_loss", {"beta": 0}),
        ("jsd_loss", {"beta": 1}),
    ):
        value, slope = value_and_slope(f, name, student, teacher, **settings)
        assert np.isposinf(value).all()
        assert np.isfinite(slope).all()


@both
def test_the_ends_of_beta_are_the_divergences_and_no_limits(f):
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 5, 7))
    for beta, name in ((0.0, "kl_loss"), (1.0, "reverse_kl_loss")):
        for number in (beta, int(beta)):
            got = value_and_slope(f, "jsd_loss", student, teacher, beta=number, temperature=2.0)
            want = value_and_slope(f, name, student, teacher, temperature=2.0)
            for a, b in zip(got, want, strict=True):
                assert ulps(4 * a, b, "float64") <= 4
        near, _ = value_and_slope(f, "jsd_loss", student, teacher, beta=abs(beta - 1e-7), temperature=2.0)
        assert (near < 1e-6).all()
        assert (
            ulps(1e7 * near, got[0], "float64") <= 2e9
        )  # the first term of its series: beta KL(q || p), (1 - beta) KL(p || q)


@both
def test_a_class_that_underflows_in_both(f):
    """A mixture of the probabilities would be 0, in float32 for logits of 104 below the largest."""
    student, teacher = np.array([[1.0, 0.0, -104.0]]), np.array([[0.0, 1.0, -104.0]])
    for name, settings in SETTINGS:
        for dtype in ("float32", "float64"):
            value, slope = value_and_slope(f, name, student, teacher, dtype, **settings)
            want, want_slope = value_and_slope(f, name, student[:, :2], teacher[:, :2], dtype, **settings)
            if name != "jsd_loss" and "temperature" in settings:
                continue  # at T = 3 the class is not that small
            assert ulps(value, want, dtype) <= 16
            assert ulps(slope[:, :2], want_slope, dtype) <= 16


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_tie_has_the_sign_0(f, dtype):
    """Even if the normalisers, sums of the same numbers in another order, are rounded differently."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        teacher = 3 * rng.normal(size=(1, 9))
        student = teacher.copy()
        student[:, :8] = rng.permuted(teacher[:, :8], axis=-1)
        student, teacher = (x.astype(np.float32) for x in (student, teacher))
        _, slope = value_and_slope(f, "tvd_loss", student, teacher, dtype)
        p, q = (np.exp(np.sort(x, -1).astype(np.longdouble)) for x in (student, teacher))
        p, q = (np.exp(x.astype(np.longdouble)) / z.sum(-1, keepdims=True) for x, z in ((student, p), (teacher, q)))
        sign = np.where(student == teacher, 0, np.sign(p - q))
        want = p * (sign - (p * sign).sum(-1, keepdims=True)) / 2
        assert np.abs(slope - want).max() <= 16 * np.finfo(dtype).eps


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.padding and x.value != "array"], ids=lambda x: x.title)
@both
def test_what_the_teacher_excludes_is_never_nan(f, loss):
    """For a class at -inf only in the second input, value and gradient have no NaN, in all losses with padding."""
    (inputs,) = draw(loss, Sizes((4,), 6), 0)
    if "labels" in inputs:
        inputs["labels"] = inputs["labels"] % 5 if loss.inputs["labels"] == "labels" else np.eye(6)[[0, 1, 2, 3]]
    second = (*loss.constant, *loss.learns[1:])[0]
    inputs[second] = inputs[second].copy()
    inputs[second][1, -1] = -INF
    first = loss.learns[0]
    for dtype in ("float64", "float32"):
        arrays = f.arrays(inputs, dtype)

        def total(x, arrays=arrays):
            values = per_example(f.kd, loss)(**{**arrays, first: x}, reduction="none")
            return values.sum(), values

        slope, values = f.grad(total, has_aux=True)(arrays[first])
        assert not np.isnan(f.numpy(values)).any()
        assert not np.isnan(f.numpy(slope)).any()


@pytest.mark.parametrize(("name", "most"), [("reverse_kl_loss", 15), ("jsd_loss", 22), ("jsd_loss-far", 30)])
def test_kernels(name, most):
    """The number of kernels over the logits, forward and backward; in eager PyTorch each is a barrier for its
    threads."""
    name, _, far = name.partition("-")
    shape, scale = (128, 1000), 6.0 if far else 1.0
    rng = np.random.default_rng(5)
    student, teacher = (torch.from_numpy(scale * rng.normal(size=shape)).float() for _ in range(2))
    function = getattr(TORCH.kd, name)
    function(student.requires_grad_(), teacher).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function(student, teacher).backward()
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


@slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@every
def test_compiled(name, settings):
    """Under `torch.compile`, and in kdjax under `jit`, `vmap` and `scan`, the results are those of eager float64."""
    rng = np.random.default_rng(6)
    student, teacher = rng.normal(size=(2, 3, 4, 5))
    value, slope = value_and_slope(TORCH, name, student, teacher, **settings)
    x, y = torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher)
    torch.compiler.reset()
    compiled = torch.compile(getattr(TORCH.kd, name), backend="aot_eager", fullgraph=True)
    got = compiled(x, y, reduction="none", **settings)
    assert ulps(got.detach().numpy(), value, "float64") <= 64
    assert ulps(torch.autograd.grad(got.sum(), x)[0].numpy(), slope, "float64") <= 64

    def step(total, pair):
        return total + getattr(JAX.kd, name)(*pair, reduction="sum", **settings), None

    total, _ = jax.jit(lambda x, y: jax.lax.scan(step, jnp.zeros(()), (x, y)))(
        jnp.asarray(student), jnp.asarray(teacher)
    )
    assert float(total) == pytest.approx(value.sum(), rel=1e-14)
