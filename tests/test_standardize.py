"""Standardised logits, entry by entry: edge cases, precision, and losses that use them."""

import jax
import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH
from tiers import first

from parity.losses.standardize import standardize_logits as plain

both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
ROWS = np.random.default_rng(0).normal(size=(4, 9))


def result(f, logits, dtype="float64", **options):
    """The result, and the gradient of a weighted sum of its finite entries."""
    x = f.array(logits, dtype)
    factor = np.cos(np.arange(logits.shape[-1]) + 1.0) * np.isfinite(logits)

    def value(x):
        array = f.kd.standardize_logits(x, **options)
        kept = jax.numpy.where(jax.numpy.isneginf(array), 0, array) if f is JAX else array.nan_to_num(neginf=0.0)
        return (kept * f.array(factor, "float64" if dtype == "float64" else "float32")).sum()

    slope = f.grad(value)(x)
    slope = slope.astype("float64") if f is JAX else slope.double()
    return f.numpy(f.kd.standardize_logits(x, **options)), f.numpy(slope)


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("level", [0.0, 1e3])
def test_every_entry_is_the_formula_s(f, dtype, scale, level):
    logits = (scale * ROWS + level).astype(dtype).astype(float)
    got, _ = result(f, logits, dtype, temperature=2.0)
    want = np.array(plain(logits.astype(np.longdouble), 2.0))
    assert got.dtype == dtype
    assert np.abs(got - want).max() <= 16 * np.finfo(dtype).eps * np.abs(want).max()


@both
@pytest.mark.parametrize("value", [0.0, 2.3, -1e4, 1e30, 3e38])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_constant_row_is_0(f, value, dtype):
    """Its gradient is that of the centring, times 10⁷ / T."""
    got, slope = result(f, np.full((2, 1000), value), dtype, temperature=2.0)
    assert (got == 0).all()
    factor = np.cos(np.arange(1000) + 1.0)
    want = (factor - factor.mean()) * 1e7 / 2
    assert np.abs(slope - want).max() <= (4e-3 if dtype == "bfloat16" else 1e-6) * np.abs(want).max()


@both
def test_two_classes_have_one_shape(f):
    """For any logits the result is ±0.7071 / T; in exact arithmetic only the 1e-7 gives a gradient."""
    logits = np.array([[3.0, -1.0], [1e4, 1e5], [-0.25, 0.5]])
    got, slope = result(f, logits, temperature=4.0)
    assert np.abs(got - np.sign(logits - logits[:, ::-1]) / np.sqrt(2) / 4).max() < 1e-7
    assert np.abs(slope).max() < 1e-6


@both
def test_rows_with_two_finite_classes_and_fewer(f):
    """A class at -inf stays there, without a gradient; a single class above -inf becomes 0."""
    logits = np.array(
        [[-np.inf, 3.0, -np.inf, -1.0], [-np.inf, 2.0, -np.inf, -np.inf], [-np.inf] * 4, [1.0, 2.0, 3.0, -np.inf]]
    )
    got, slope = result(f, logits)
    assert np.array_equal(np.isneginf(got), np.isneginf(logits))
    assert np.abs(got[0, [1, 3]] - np.array([1, -1]) / np.sqrt(2)).max() < 1e-7
    assert got[1, 1] == 0
    alone, moved = result(f, logits[3:, :3])
    assert np.abs(got[3, :3] - alone[0]).max() < 1e-15
    assert np.abs(slope[3, :3] - moved[0]).max() < 1e-15
    assert (slope[np.isneginf(logits)] == 0).all()
    assert slope[1, 1] == 0
    assert np.isfinite(slope).all()


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_ends_of_the_range(f, dtype):
    """The largest numbers of both signs, and the smallest."""
    most, least = float(np.finfo(dtype).max), float(np.finfo(dtype).smallest_subnormal)
    logits = np.array(
        [[most, -most, 0.0], [-most, -most, most], [least, -least, 0.0], [1.0, 1.0 + 8 * np.finfo(dtype).eps, 1.0]]
    )
    got, slope = result(f, logits, dtype)
    assert np.isfinite(got).all()
    assert np.isfinite(slope).all()
    assert got[0] == pytest.approx([1.0, -1.0, 0.0], rel=1e-6)


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(f, dtype):
    got, slope = result(f, ROWS, dtype)
    halves = f.array(ROWS, dtype)
    wide = f.numpy(halves.astype("float32") if f is JAX else halves.float())
    want, moved = result(f, wide.astype(float), "float32")
    assert got.dtype == "float32"
    assert np.array_equal(got, want)
    assert np.abs(slope - moved).max() <= 2.0**-8 * np.abs(moved).max()


@both
def test_both_places_of_the_temperature(f):
    """T² KL(T=1) of logits standardised with T equals KL(T) of those standardised with 1; other losses accept them
    too."""
    student, teacher = f.array(ROWS), f.array(3 * ROWS[:, ::-1].copy())
    kd = f.kd
    one = 4 * kd.kl_loss(
        kd.standardize_logits(student, temperature=2.0), kd.standardize_logits(teacher, temperature=2.0)
    )
    other = kd.kl_loss(kd.standardize_logits(student), kd.standardize_logits(teacher), temperature=2.0)
    assert float(one) == pytest.approx(float(other), rel=1e-12)
    labels = f.array(np.arange(4))
    assert np.isfinite(float(kd.dkd_loss(kd.standardize_logits(student), kd.standardize_logits(teacher), labels)))
    scaled = kd.kl_loss(kd.standardize_logits(7 * student + 2), kd.standardize_logits(student))
    assert float(scaled) == pytest.approx(0, abs=1e-12)


@pytest.mark.filterwarnings("ignore:kl_loss. `teacher_logits` requires a gradient")  # as it should
@both
def test_a_teacher_through_it_stays_constant(f):
    teacher, student = f.array(ROWS), f.array(ROWS[::-1].copy())
    slope = f.grad(lambda t: f.kd.kl_loss(f.kd.standardize_logits(student), f.kd.standardize_logits(t)))(teacher)
    assert (f.numpy(slope) == 0).all()


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_compiled():
    torch._dynamo.reset()
    x = TORCH.array(ROWS).requires_grad_()
    compiled = torch.compile(TORCH.kd.standardize_logits, backend="aot_eager", fullgraph=True)
    slopes = [
        torch.autograd.grad((g(x) * x.detach().cos()).sum(), x)[0] for g in (compiled, TORCH.kd.standardize_logits)
    ]
    assert torch.allclose(*slopes, rtol=1e-12)
