"""DIST: batches and rows without correlation, the role of eps, and errors."""

import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH
from tiers import first

from parity.losses.dist import dist_loss

both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)


def logits(batch, classes, seed=0):
    return 3 * np.random.default_rng(seed).normal(size=(2, batch, classes))


def evaluated(f, student, teacher, dtype="float64", **options):
    """The loss and its gradient."""
    options = {k: f.array(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}

    def value(x, teacher):
        result = f.kd.dist_loss(x, teacher, **options)
        return result, result

    slope, result = f.jit(f.grad(value, has_aux=True))(f.array(student, dtype), f.array(teacher, dtype))
    return float(result), f.numpy(slope)


def exact(student, teacher, dtype="float64", **options):
    """The formula's value in extended precision, and its gradient by a complex step."""
    student, teacher = (x.astype(dtype).astype(np.longdouble) for x in (student, teacher))
    slope = np.zeros(student.shape)
    for place in np.ndindex(student.shape):
        moved = student.astype(np.clongdouble)
        moved[place] += 1e-30j
        slope[place] = np.imag(dist_loss(moved, teacher, **options)[0]) / 1e-30
    return float(dist_loss(student, teacher, **options)[0]), slope


def agree(got, want, ulp, dtype="float64"):
    eps = ulp * float(np.finfo(dtype).eps)
    assert got[0] == pytest.approx(want[0], rel=eps, abs=eps)
    assert np.abs(got[1] - want[1]).max() <= 4 * eps * max(np.abs(want[1]).max(), 1e-3)


@both
def test_one_row(f):
    """A single row has no relation between examples: that term is gamma T^2, without a gradient."""
    student, teacher = logits(1, 6)
    alone, slope = evaluated(f, student, teacher, beta=0.0, gamma=0.7, temperature=2.0)
    assert alone == pytest.approx(0.7 * 4, rel=1e-12)
    assert (slope == 0).all()
    agree(evaluated(f, student, teacher, gamma=0.7), exact(student, teacher, gamma=0.7), 16)


@both
def test_two_classes(f):
    """The rows have a correlation of 1 or -1, and a gradient only through eps."""
    student, teacher = logits(5, 2)
    value, slope = evaluated(f, student, teacher, gamma=0.0)
    opposite = np.sign(student[:, 0] - student[:, 1]) != np.sign(teacher[:, 0] - teacher[:, 1])
    assert value == pytest.approx(2 * opposite.mean(), abs=1e-5)
    assert np.abs(slope).max() < 1e-4
    value, slope = evaluated(f, student, teacher, gamma=0.0, eps=1e-30)
    assert value == pytest.approx(2 * opposite.mean(), abs=1e-14)
    assert np.abs(slope).max() < 1e-14
    agree(evaluated(f, student, teacher), exact(student, teacher), 16)


@both
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_a_column_of_equal_entries(f, whose):
    """A class with the same probability in all examples has relation 0; in the student its gradient is y / eps."""
    student, teacher = logits(4, 3)
    for x in {"student": [student], "teacher": [teacher], "both": [student, teacher]}[whose]:
        x[:] = x[0]
    got, want = evaluated(f, student, teacher), exact(student, teacher)
    agree(got, want, 16)
    assert np.isfinite(got[1]).all()
    assert (np.abs(got[1]).max() > 1e5) == (whose == "student")


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rows", ["one", "all"])
def test_a_uniform_student(f, dtype, rows):
    """Its gradient is large, finite, and right."""
    student, teacher = logits(4, 6)
    student[0 if rows == "one" else slice(None)] = 0.7
    got, want = evaluated(f, student, teacher, dtype), exact(student, teacher, dtype)
    agree(got, want, 16, dtype)
    assert 1e5 < np.abs(got[1]).max() < 1e8


@both
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("rows", ["one", "all"])
def test_a_nearly_uniform_student(f, spread, rows):
    """It keeps its digits in float32; this is how a training begins."""
    student, teacher = logits(5, 6)
    student[0 if rows == "one" else slice(None)] *= spread
    agree(evaluated(f, student, teacher, "float32"), exact(student, teacher, "float32"), 16, "float32")


@both
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_a_student_near_its_teacher(f, distance):
    """A small loss keeps its digits in float32."""
    student, teacher = logits(6, 9)
    student = teacher + distance * student
    agree(evaluated(f, student, teacher, "float32"), exact(student, teacher, "float32"), 16, "float32")


@both
def test_padding_and_masks(f):
    """A class at -inf in all kept rows of both is left out of C and of the means; one at -inf only in the student is
    not."""
    student, teacher = logits(5, 4)
    where = np.array([True, True, False, True, True])
    want = exact(student[where], teacher[where])
    padded = [np.concatenate([x, np.full((5, 1), -np.inf)], 1) for x in (student, teacher)]
    for x in padded:
        x[2] = np.nan
    value, slope = evaluated(f, *padded, where=where)
    agree((value, slope[where][:, :4]), want, 16)
    assert (slope[:, 4] == 0).all()
    assert (slope[2] == 0).all()
    padded[1][where, 4] = 0.0
    got = evaluated(f, *(x[where] for x in padded))
    agree(got, exact(*(x[where] for x in padded)), 16)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_everything_masked(f, reduction):
    student, teacher = logits(3, 4)
    value, slope = evaluated(f, np.full_like(student, np.nan), teacher, where=np.zeros(3, bool), reduction=reduction)
    assert value == 0
    assert (slope == 0).all()


@both
def test_eps_is_a_term(f):
    """With 50,000 classes, equal student and teacher have a class relation of 0.30; with a small eps it is 1."""
    x = np.random.default_rng(0).normal(size=(12, 50_000))
    (value, slope), (small, _) = (evaluated(f, x, x, beta=0.0, **more) for more in ({}, {"eps": 1e-20}))
    assert value == pytest.approx(0.70, abs=0.005)
    assert np.isfinite(slope).all()
    assert small == pytest.approx(0, abs=1e-9)


@both
def test_no_value_of_an_example(f):
    student, teacher = f.arrays(logits(3, 4), "float32")
    with pytest.raises(
        ValueError, match=r'must be "mean" or "sum" in dist_loss, got \'none\': the relation of a class'
    ):
        f.kd.dist_loss(student, teacher, reduction="none")
    with pytest.raises(ValueError, match=r'`reduction` must be one of "mean", "sum", "none", got \'max\''):
        f.kd.dist_loss(student, teacher, reduction="max")


@both
@pytest.mark.parametrize("near", [False, True])
def test_the_sum_is_the_mean_times_the_kept(f, near):
    student, teacher = logits(6, 5)
    student = teacher + 1e-3 * student if near else student
    where = np.arange(6) != 1
    mean, total = (evaluated(f, student, teacher, where=where, reduction=x) for x in ("mean", "sum"))
    assert total[0] == pytest.approx(5 * mean[0], rel=1e-14)
    np.testing.assert_allclose(total[1], 5 * mean[1], rtol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_kdtorch_goes_two_ways_to_the_same_numbers(spread):
    """Eager code checks whether student and teacher are close; traced code computes both ways."""
    student, teacher = map(torch.from_numpy, logits(6, 5))
    student = (teacher + spread * student).requires_grad_()
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    eager = torch.autograd.grad(TORCH.kd.dist_loss(student, teacher, temperature=temperature), (student, temperature))
    traced = torch.func.grad(lambda x, t: TORCH.kd.dist_loss(x, teacher, temperature=t), argnums=(0, 1))(
        student.detach(), temperature.detach()
    )
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
