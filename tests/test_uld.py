"""ULD: two vocabularies, ties, and the effect of sorting on gradients."""

import jax
import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH
from tiers import first, slow

from kdjax.logits.uld import _argsort, _by_digits, _descending, _keys

both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)


def evaluated(f, student, teacher, dtype="float64", **options):
    """The values, and the gradient of their sum."""

    def total(x, teacher):
        values = f.kd.uld_loss(x, teacher, reduction="none", **options)
        return values.sum(), values

    slope, values = f.jit(f.grad(total, has_aux=True))(f.array(student, dtype), f.array(teacher, dtype))
    return f.numpy(values), f.numpy(
        slope.astype("float32") if f is JAX and "16" in dtype else slope.double() if f is TORCH else slope
    )


def padded(x, number):
    return np.concatenate([x, np.full((*x.shape[:-1], number), -np.inf)], -1)


@both
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("ours", "theirs"), [(5, 9), (9, 5), (2, 33), (33, 2), (7, 7)])
def test_classes_that_are_missing_have_probability_0(f, dtype, ours, theirs):
    """Value and gradient do not change if the vocabularies are padded with -inf to the same size, or to a larger
    one."""
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.normal(size=(2, 3, ours)), 3 * rng.normal(size=(2, 3, theirs))
    value, slope = evaluated(f, student, teacher, dtype)
    for more in (0, 3):
        size = max(ours, theirs) + more
        got, moved = evaluated(f, padded(student, size - ours), padded(teacher, size - theirs), dtype)
        eps = 2e-6 if dtype != "float64" else 1e-14
        assert np.abs(got - value).max() <= eps
        assert np.abs(moved[..., :ours] - slope).max() <= (1e-2 if dtype == "bfloat16" else eps)
        assert (moved[..., ours:] == 0).all()


@both
def test_a_permutation_has_no_loss_and_no_gradient(f):
    rng = np.random.default_rng(1)
    for logits in (3 * rng.normal(size=(4, 9)), np.round(rng.normal(size=(4, 9))), 1e4 * rng.normal(size=(4, 9))):
        for dtype in ("float64", "float32"):
            order = rng.permutation(9)
            value, slope = evaluated(f, logits[:, order], logits + np.arange(4)[:, None], dtype)
            exact = dtype == "float64" and np.abs(logits).max() < 1e3
            assert (np.abs(value) <= (1e-14 if exact else 2e-3)).all()
            value, slope = evaluated(f, padded(logits[:, order], 2), logits, dtype)
            assert (value == 0).all()
            assert (slope == 0).all()


@both
def test_ties_are_sorted_in_their_order(f):
    """The first of equal logits comes first, as in both frameworks' stable sorts, and -0 equals 0."""
    student, teacher = np.array([[0.0, -0.0, 1.0, 0.0]]), np.array([[1.0, 0.5, -0.5, -1.5]])
    p, q = (np.exp(x[0]) / np.exp(x[0]).sum() for x in (student, teacher))
    places = np.array([1, 2, 0, 3])
    signs = np.sign(np.sort(p)[::-1] - q)[places]
    assert len(set(signs[[0, 1, 3]])) == 2  # the sign changes within the tie
    value, slope = evaluated(f, student, teacher)
    assert slope[0] == pytest.approx(p * (signs - (p * signs).sum()), rel=1e-12)
    assert value[0] == pytest.approx(np.abs(np.sort(p)[::-1] - q).sum(), rel=1e-12)


@both
def test_a_gap_of_0_has_no_gradient(f):
    """p and q are equal at one place, and different at others."""
    student, teacher = np.log([[0.5, 0.3, 0.2]]), np.log([[0.5, 0.25, 0.25]])
    _, slope = evaluated(f, student, teacher)
    p, signs = np.exp(student[0]), np.array([0.0, 1.0, -1.0])
    assert np.abs(slope[0] - p * (signs - (p * signs).sum())).max() < 0.51  # rounding decides the first sign
    assert slope.sum() == pytest.approx(0, abs=1e-15)


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("distance", [1e-2, 1e-5])
def test_near_equality(f, dtype, distance):
    """A small loss keeps its digits: it is within 16 ULP of the result in extended precision for the same logits."""
    rng = np.random.default_rng(2)
    teacher = 3 * rng.normal(size=(6, 40))
    student = teacher + distance * rng.normal(size=(6, 40))
    student, teacher = (x.astype(dtype).astype(np.longdouble) for x in (student, teacher))
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (student, teacher))
    p, q = (np.sort(x / x.sum(-1, keepdims=True)) for x in (p, q))
    value, _ = evaluated(f, student.astype(float), teacher.astype(float), dtype)
    rounding = np.finfo(np.longdouble).eps / distance  # of the difference in extended precision
    assert np.abs(value / np.abs(p - q).sum(-1) - 1).max() <= 16 * np.finfo(dtype).eps + 2 * rounding


@slow
@pytest.mark.parametrize("classes", [2, 3, 255, 256, 257, 70_000])
def test_a_sort_by_digits_is_a_stable_sort(classes):
    rng = np.random.default_rng(3)
    for x in (
        rng.normal(size=(2, classes)),
        np.round(3 * rng.normal(size=(2, classes))),
        padded(rng.normal(size=(2, classes - 1)), 1),
    ):
        x = x.astype("float32")
        keys = _keys(jax.numpy.asarray(x))
        want = np.argsort(-x, -1, kind="stable")
        assert np.array_equal(_by_digits(keys), want)
        assert np.array_equal(_argsort(keys), want)
        assert np.array_equal(_descending(jax.numpy.asarray(x)), -np.sort(-x, -1))


def test_kdtorch_sorts_alike_with_and_without_a_graph():
    """On a CPU NumPy sorts the teacher, elsewhere PyTorch does."""
    x, y = torch.randn(3, 50), torch.randn(3, 60).round()
    eager = TORCH.kd.uld_loss(x, y, reduction="none")
    traced = torch.func.vmap(lambda x, y: TORCH.kd.uld_loss(x, y))(x, y)
    assert torch.allclose(eager, traced, rtol=1e-6)
