"""Difficult cases for skewed KL, α-β-divergence and TAID: ends, infinite logits, exponents of 0, and close rows."""

import numpy as np
import pytest
import torch
from test_divergences import INF, both, value_and_slope
from tiers import slow

import kdtorch
from parity.compare import ulps

EXPONENTS = [(0.5, 0.5), (0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1e-4, 1e-4), (0.5, -0.5), (-0.3, 1.2)]
SETTINGS = [
    *(("alpha_beta_loss", {"alpha": alpha, "beta": beta}) for alpha, beta in EXPONENTS),
    ("skew_kl_loss", {"skew": 0.0}),
    ("skew_kl_loss", {"skew": 0.1}),
    ("skew_reverse_kl_loss", {"skew": 0.0}),
    ("skew_reverse_kl_loss", {"skew": 0.1}),
    ("taid_loss", {"interpolation": 0.4}),
]
STUDENT, TEACHER = np.array([[2.0, 0.0, -1.0, 0.5]] * 4), np.array([[1.0, 1.0, -1.0, 0.0]] * 4)
STUDENT[[1, 3], 2] = TEACHER[[2, 3], 2] = -INF  # rows: in none, in the student, in the teacher, in both


@both
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: x if isinstance(x, str) else str(x))
def test_float32_keeps_its_digits_where_rows_nearly_agree(f, name, settings):
    """Compared with float64 for the same float32 logits, which `parity` compares with the formula. For rows that are
    far apart, a TAID gradient is the difference of two softmaxes."""
    rng = np.random.default_rng(0)
    for apart in (1.0, 0.1, 1e-2, 1e-3, 1e-4):
        teacher = (3 * rng.normal(size=(4, 50))).astype(np.float32)
        student = (teacher + apart * rng.normal(size=teacher.shape)).astype(np.float32)
        narrow, wide = (
            value_and_slope(f, name, student, teacher, dtype, **settings) for dtype in ("float32", "float64")
        )
        limit = 32 if name == "taid_loss" else 16
        for got, want in zip(narrow, wide, strict=True):
            assert ulps(got, want, "float32") <= limit, apart


@both
@pytest.mark.parametrize(
    ("name", "settings", "other"),
    [
        ("skew_kl_loss", {"skew": 0.0}, "kl_loss"),
        ("skew_reverse_kl_loss", {"skew": 0.0}, "reverse_kl_loss"),
        ("alpha_beta_loss", {"alpha": 1.0, "beta": 0.0}, "kl_loss"),
        ("alpha_beta_loss", {"alpha": 0.0, "beta": 1.0}, "reverse_kl_loss"),
        ("taid_loss", {"interpolation": 1.0}, "kl_loss"),
    ],
)
def test_an_end_is_a_kl(f, name, settings, other):
    """Also where a class is at -inf."""
    got, want = value_and_slope(f, name, STUDENT, TEACHER, **settings), value_and_slope(f, other, STUDENT, TEACHER)
    assert np.array_equal(np.isinf(got[0]), np.isinf(want[0]))
    finite = np.isfinite(want[0])
    assert ulps(got[0][finite], want[0][finite], "float64") <= 16
    assert ulps(got[1][finite], want[1][finite], "float64") <= 64
    assert np.isfinite(got[1]).all()


@both
@pytest.mark.parametrize("name", ["skew_kl_loss", "skew_reverse_kl_loss"])
def test_a_skew_of_one_and_the_bound(f, name):
    for dtype in ("float64", "float32"):
        value, slope = value_and_slope(f, name, STUDENT, TEACHER, dtype, skew=1.0)
        assert (value == 0).all()
        assert np.abs(slope).max() <= 1e-15
        apart = np.array([[0.0, -INF], [0.0, -1e4], [0.0, -104.0]])
        value, slope = value_and_slope(f, name, apart, apart[:, ::-1].copy(), dtype, skew=0.1)
        assert value == pytest.approx([-np.log(0.1)] * 3, rel=1e-6)
        assert np.isfinite(slope).all()
        value, slope = value_and_slope(f, name, STUDENT, TEACHER, dtype, skew=0.1)
        assert np.isfinite(value).all()
        assert np.isfinite(slope).all()
        alone = value_and_slope(f, name, STUDENT[3:, [0, 1, 3]], TEACHER[3:, [0, 1, 3]], dtype, skew=0.1)
        assert ulps(value[3:], alone[0], dtype) <= 16
        assert ulps(slope[3:, [0, 1, 3]], alone[1], dtype) <= 32
        assert slope[3, 2] == 0


@both
@pytest.mark.parametrize(("alpha", "beta"), [*EXPONENTS, (1.0, 1.0), (0.5, 0.0), (2.0, -1.0)])
def test_infinite_logits_of_the_alpha_beta_divergence(f, alpha, beta):
    """Finite for -inf only in the student if β > 0 and α + β > 0, only in the teacher if α > 0 and α + β > 0; never
    NaN."""
    for dtype in ("float64", "float32"):
        value, slope = value_and_slope(f, "alpha_beta_loss", STUDENT, TEACHER, dtype, alpha=alpha, beta=beta)
        total = alpha + beta
        student, teacher = not (beta > 0 and total > 0), not (alpha > 0 and total > 0)
        assert np.array_equal(np.isposinf(value), [False, student, teacher, False])
        assert not np.isnan(value).any()
        assert np.isfinite(slope).all()


@both
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.0, 0.5), (0.5, -0.5), (0.0, 0.0)])
def test_an_exponent_of_zero_is_the_limit(f, alpha, beta):
    """It is what a tiny exponent of either sign gives, also in float32, because no difference is divided by it."""
    for dtype, rel in (("float64", 1e-6), ("float32", 1e-5)):
        at, *near = (
            value_and_slope(f, "alpha_beta_loss", STUDENT[:1], TEACHER[:1], dtype, alpha=alpha + step, beta=beta + step)
            for step in (0.0, 1e-7, -1e-7)
        )
        for value, slope in near:
            assert value == pytest.approx(at[0], rel=rel)
            assert slope == pytest.approx(at[1], rel=rel, abs=rel * float(np.abs(at[1]).max()))


@both
def test_ends_of_the_interpolation(f):
    """At λ = 0 the target is the student, even with a teacher at -inf; between the ends, a class at -inf has no
    target."""
    for dtype in ("float64", "float32"):
        value, slope = value_and_slope(f, "taid_loss", STUDENT, TEACHER, dtype, interpolation=0.0)
        assert np.abs(value).max() <= 1e-15
        assert np.abs(slope).max() <= 1e-15
        value, slope = value_and_slope(f, "taid_loss", STUDENT, TEACHER, dtype, interpolation=0.5)
        assert np.isfinite(value).all()
        assert np.isfinite(slope).all()
        assert (slope[[1, 3], 2] == 0).all()
        assert slope[2, 2] > 0


@slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_exponents_that_move_under_a_compiler():
    """At the second value, `torch.compile` turns an exponent into a symbol, which may be negative."""
    torch._dynamo.reset()
    student, teacher = (torch.from_numpy(x[:1]) for x in (STUDENT, TEACHER))
    compiled = torch.compile(kdtorch.alpha_beta_loss, fullgraph=True, backend="eager")
    for alpha, beta in EXPONENTS:
        want = kdtorch.alpha_beta_loss(student, teacher, alpha=alpha, beta=beta)
        assert float(compiled(student, teacher, alpha=alpha, beta=beta)) == pytest.approx(float(want), rel=1e-12)
