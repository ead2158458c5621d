"""Edge cases of losses of feature maps: scales, zeros, powers, a single position, and many positions."""

import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH
from tiers import first
from torch.nn.functional import normalize

import kdtorch
from parity.cases import LOSSES, Case
from parity.check import check
from parity.compare import Comparison

both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
LISTED = ("attention_transfer_loss", "nst_loss", "ab_loss")
# losses that do not depend on the scale of a map
SCALELESS = [
    ("attention_transfer_loss", {}),
    ("attention_transfer_loss", {"p": 3}),
    ("attention_transfer_loss", {"p": 2.5}),
    ("attention_transfer_loss", {"p": 9}),
    ("nst_loss", {}),
    ("factor_transfer_loss", {}),
    ("factor_transfer_loss", {"p1": 3, "p2": 1.5}),
    ("factor_transfer_loss", {"p1": 2, "channel_mean": True}),
]
scaleless = pytest.mark.parametrize(("name", "options"), SCALELESS, ids=str)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def evaluated(f, name, student, teacher, dtype="float64", **options):
    """The value of each example and the gradient of their sum, for maps with channels first."""

    def total(x, teacher):
        given = ([x], [teacher]) if name in LISTED else (x, teacher)
        values = getattr(f.kd, name)(*given, channel_axis=1, reduction="none", **options)
        return values.sum(), values

    slope, values = f.jit(f.grad(total, has_aux=True))(f.array(student, dtype), f.array(teacher, dtype))
    return f.numpy(values), f.numpy(slope)


@both
@scaleless
def test_the_scale_of_a_map_does_not_matter(f, name, options):
    """In float32 from 1e-30 to 1e30, the value is the same, and the gradient is inversely proportional to the scale."""
    student, teacher = drawn(3, 4, 3, 5), drawn(3, 4, 3, 5, seed=1)
    value, slope = evaluated(f, name, student, teacher, **options)
    for ours, theirs in ((1e-7, 1.0), (1e10, 1e-7), (1e-30, 1e30), (1.0, 1e10)):
        got, moved = evaluated(f, name, ours * student, theirs * teacher, "float32", **options)
        np.testing.assert_allclose(got, value, rtol=2e-5)
        np.testing.assert_allclose(moved * ours, slope, rtol=2e-5, atol=2e-5 * np.abs(slope).max())


@both
@scaleless
def test_maps_and_channels_of_zeros(f, name, options):
    """They count as length 0: the results are finite, without a gradient, and zero maps are equal to each other."""
    student, teacher = drawn(4, 3, 2, 4), drawn(4, 3, 2, 4, seed=1)
    student[0], teacher[1], student[2:4], teacher[3] = 0, 0, 0, 0
    student[2, 1] = drawn(2, 4)
    for dtype in ("float64", "float32"):
        value, slope = evaluated(f, name, student, teacher, dtype, **options)
        assert np.isfinite(value).all()
        assert (value[:3] > 0).all()
        assert value[3] == 0
        assert np.isfinite(slope).all()
        assert (slope[[0, 3]] == 0).all()
        assert (slope[[1, 2]] != 0).any() or "p1" in options
        if name == "nst_loss":
            assert (slope[2, [0, 2]] == 0).all()


@both
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention_transfer_loss", {"p": 200}),
        ("factor_transfer_loss", {"p1": 40}),
        ("factor_transfer_loss", {"p1": 201}),
    ],
    ids=str,
)
def test_high_powers(f, name, options):
    """Only the largest entry counts then: results are finite, and float32 gives the float64 value."""
    student, teacher = 1e10 * drawn(3, 4, 3, 5), drawn(3, 4, 3, 5, seed=1)
    value, _ = evaluated(f, name, student, teacher, **options)
    got, slope = evaluated(f, name, student, teacher, "float32", **options)
    np.testing.assert_allclose(got, value, rtol=1e-4)
    assert np.isfinite(slope).all()


@both
def test_one_position(f):
    """A single position has all of the attention; only a factor over channels is left to compare."""
    student, teacher = drawn(2, 3, 1, 1), drawn(2, 3, 1, 1, seed=1)
    for name, options in (("attention_transfer_loss", {}), ("attention_transfer_loss", {"p": 3}), ("nst_loss", {})):
        value, slope = evaluated(f, name, student, teacher, **options)
        np.testing.assert_allclose(value, 0, atol=1e-30)
        np.testing.assert_allclose(slope, 0, atol=1e-15)
    wholes = [x.reshape(2, 3) / np.linalg.norm(x.reshape(2, 3), axis=1, keepdims=True) for x in (student, teacher)]
    value, _ = evaluated(f, "factor_transfer_loss", student, teacher)
    np.testing.assert_allclose(value, np.abs(wholes[0] - wholes[1]).mean(1))
    value, slope = evaluated(f, "factor_transfer_loss", student, teacher, channel_mean=True)
    opposite = np.sign(student.mean((1, 2, 3))) != np.sign(teacher.mean((1, 2, 3)))
    np.testing.assert_allclose(value, 2.0 * opposite, atol=1e-15)
    np.testing.assert_allclose(slope, 0, atol=1e-15)


@both
def test_odd_powers(f):
    """Attention uses absolute values, so that channels do not cancel; a factor keeps its signs."""
    x = drawn(2, 3, 2, 3)
    teacher = drawn(2, 3, 2, 3, seed=1)
    for p in (1, 3, 2.5):
        value, slope = evaluated(f, "attention_transfer_loss", x, teacher, p=p)
        got, moved = evaluated(f, "attention_transfer_loss", -x, teacher, p=p)
        np.testing.assert_array_equal(got, value)
        np.testing.assert_array_equal(moved, -slope)
        signs = np.sign(drawn(2, 3, 1, 1, seed=2))
        assert (evaluated(f, "attention_transfer_loss", signs * x, x, p=p)[0] < 1e-30).all()
    for p1 in (1, 3):
        powers = (x**p1).reshape(2, -1)
        want = 2 * np.abs(powers / np.linalg.norm(powers, axis=1, keepdims=True)).mean(1)
        np.testing.assert_allclose(evaluated(f, "factor_transfer_loss", x, -x, p1=p1)[0], want, rtol=1e-12)
    assert (evaluated(f, "factor_transfer_loss", x, -x, p1=2)[0] < 1e-15).all()


@both
def test_entries_of_zero_are_not_pulled(f):
    """The derivative of |f|^p is 0 at 0, also for p = 1, and that of |difference| is 0 at a tie."""
    student, teacher = drawn(2, 3, 2, 2), drawn(2, 3, 2, 2, seed=1)
    student[:, 1] = 0
    for p in (1, 1.5, 2, 3):
        _, slope = evaluated(f, "attention_transfer_loss", student, teacher, p=p)
        assert (slope[:, 1] == 0).all()
        assert (slope[:, 0] != 0).all()
    for p2 in (1, 1.5, 2):
        assert (evaluated(f, "factor_transfer_loss", teacher, teacher, p2=p2)[1] == 0).all()


@both
@pytest.mark.parametrize(("channels", "size"), [((3, 5), (10, 9)), ((2, 70), (13, 11)), ((80, 4), (9, 19))], ids=str)
def test_selectivity_of_many_positions(f, channels, size):
    """Blocks of rows give the value and the gradient of the whole kernels."""
    student, teacher = drawn(2, channels[0], *size), drawn(2, channels[1], *size, seed=1)
    x = torch.tensor(student, requires_grad=True)
    u, v = (normalize(z.flatten(2), dim=2) for z in (x, torch.tensor(teacher)))
    kernels = [(a @ b.mT).square().mean((1, 2)) for a, b in ((u, u), (v, v), (u, v))]
    want = kernels[0] + kernels[1] - 2 * kernels[2]
    want.sum().backward()
    value, slope = evaluated(f, "nst_loss", student, teacher)
    np.testing.assert_allclose(value, want.detach(), rtol=1e-10)
    np.testing.assert_allclose(slope, x.grad, atol=1e-10 * float(x.grad.abs().max()))


@both
def test_selectivity_near_equality(f):
    """It is accurate in float32, where the means of kernels would cancel."""
    teacher = drawn(2, 8, 6, 6).astype("float32")
    student = (teacher + 1e-3 * drawn(2, 8, 6, 6, seed=1)).astype("float32")
    value, slope = evaluated(f, "nst_loss", student, teacher)
    got, moved = evaluated(f, "nst_loss", student, teacher, "float32")
    np.testing.assert_allclose(got, value, rtol=1e-3)
    np.testing.assert_allclose(moved, slope, atol=1e-3 * np.abs(slope).max())


@both
def test_boundaries(f):
    """An entry of 0 in the teacher is not active; there is no gradient at the margin; the last map has the largest
    weight."""
    student = np.array([1.0, 0.0, -1.0, -3.0, 0.5, -2.0]).reshape(1, 1, 2, 3)
    teacher = np.array([1.0, 0.0, 0.0, 2.0, -0.0, -1.0]).reshape(1, 1, 2, 3)
    value, slope = evaluated(f, "ab_loss", student, teacher)
    assert value == 1 + 16 + 2.25
    assert slope.ravel().tolist() == [0, 2, 0, -8, 3, 0]
    maps = [f.array(x) for x in (student, student, student)], [f.array(x) for x in (teacher, teacher, teacher)]
    assert float(f.kd.ab_loss(*maps, channel_axis=1)) == 1.75 * (1 + 16 + 2.25)


@pytest.mark.parametrize(
    ("name", "options"),
    [("attention_transfer_loss", {}), ("nst_loss", {}), ("factor_transfer_loss", {"p2": 2}), ("ab_loss", {})],
    ids=str,
)
def test_second_derivative_where_student_is_teacher(name, options):
    """The value is exactly 0 there, but the curvature must remain."""
    x, direction = (torch.tensor(drawn(2, 3, 3, 2, seed=i)) for i in range(2))
    teacher = x.clone()

    def slope(z, create_graph=False):
        z = z if z.requires_grad else z.clone().requires_grad_()
        given = ([z], [teacher]) if name in LISTED else (z, teacher)
        return torch.autograd.grad(getattr(kdtorch, name)(*given, **options), z, create_graph=create_graph)[0]

    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad((slope(leaf, create_graph=True) * direction).sum(), leaf)
    want = (slope(x + 1e-6 * direction) - slope(x - 1e-6 * direction)) / 2e-6
    assert got.abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_entries_that_are_equal_but_for_rounding():
    """If all entries of a map have one magnitude, unit maps agree where the signs do; |d| has no gradient there."""
    student, teacher = (np.sign(drawn(3, 2, 2, 3, seed=seed)) for seed in (0, 1))
    loss = next(loss for loss in LOSSES if loss.name == "factor_transfer_loss")
    inputs = {"student_map": 3 * 2.0**-24 * student, "teacher_map": 65504 * teacher}
    comparison = Comparison(tuple(check(Case(loss, "equal entries", (inputs,)), "float64", ["torch"])))
    assert comparison.passed, f"\n{comparison}"
