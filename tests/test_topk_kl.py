"""What is particular to `topk_kl_loss`; the laws and the comparison with the oracle are those of every loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import BOTH, JAX

from kdlosses.cache import largest_logits
from parity.compare import ulps

RNG = np.random.default_rng(0)
CLASSES = 9
STUDENT, TEACHER = (3 * RNG.normal(size=(6, CLASSES)) for _ in range(2))
both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)


def kept(teacher, top_k, temperature):
    """The logits, classes and rest that a cache would keep, the rest in its float32."""
    found = largest_logits(teacher, top_k, [temperature])
    return found["values"], found["indices"].astype(np.int64), found["rest"][..., 0].astype(np.float64)


def value_and_slope(f, student, *teacher, dtype="float64", name="topk_kl_loss", **options):
    """The value of each example, and the gradient of their sum."""
    teacher = f.arrays(list(teacher), dtype)

    def total(x):
        values = getattr(f.kd, name)(x, *teacher, reduction="none", **options)
        return values.sum(), values

    slope = f.grad(total, has_aux=True)
    slope, values = (jax.jit(slope) if f is JAX else slope)(f.array(student, dtype))
    return f.numpy(values), f.numpy(slope)


def full(f, student, teacher, temperature):
    return value_and_slope(f, student, teacher, name="kl_loss", temperature=temperature)


@both
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_all_classes_are_the_full_kl(f, temperature, tail):
    values, indices, _ = kept(TEACHER, CLASSES, temperature)
    got = value_and_slope(f, STUDENT, values, indices, temperature=temperature, tail=tail)
    for a, b in zip(got, full(f, STUDENT, TEACHER, temperature), strict=True):
        assert ulps(a, b, "float64") <= 16


@both
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_bucket_is_a_lower_bound_and_exact_where_the_rest_agrees(f, temperature):
    values, indices, _ = kept(TEACHER, 3, temperature)
    order = np.argsort(-TEACHER, -1)[:, 3:]
    rest = temperature * np.log(np.exp(np.take_along_axis(TEACHER, order, -1) / temperature).sum(-1))
    bound, _ = value_and_slope(f, STUDENT, values, indices, rest, temperature=temperature)
    whole, _ = full(f, STUDENT, TEACHER, temperature)
    assert (bound < whole).all()
    student = STUDENT.copy()
    np.put_along_axis(student, order, np.take_along_axis(TEACHER, order, -1) + 0.7, -1)
    exact, _ = value_and_slope(f, student, values, indices, rest, temperature=temperature)
    assert ulps(exact, full(f, student, TEACHER, temperature)[0], "float64") <= 64


@both
def test_logarithms_of_probabilities_are_logits(f):
    log_q = TEACHER - np.log(np.exp(TEACHER).sum(-1, keepdims=True))
    for logits in (TEACHER, log_q):
        values, indices, _ = kept(logits, 4, 3.0)
        rest = 3 * np.log(np.exp(logits / 3).sum(-1) - np.exp(values / 3).sum(-1))
        got = value_and_slope(f, STUDENT, values, indices, rest, temperature=3.0)
        if logits is TEACHER:
            want = got
    for a, b in zip(got, want, strict=True):
        assert ulps(a, b, "float64") <= 64


@both
def test_a_tiny_rest_keeps_its_digits(f):
    """Where one less the sum of the kept probabilities would be 0 in float32."""
    student, teacher = np.array([[20.0, 0.0, -1.0, -2.0]]), np.array([[25.0, 0.0, -3.0, -2.0]])
    values, indices = teacher[:, :1], np.array([[0]])
    rest = np.log(np.exp(teacher[:, 1:]).sum(-1))
    wide = value_and_slope(f, student, values, indices, rest)
    narrow = value_and_slope(f, student, values, indices, rest, dtype="float32")
    assert 0 < wide[0][0] < 1e-7
    assert ulps(narrow[0], wide[0], "float32") <= 32
    assert (
        ulps(narrow[1][:, 1:], wide[1][:, 1:], "float32") <= 32
    )  # of the rest; p - q at the kept class is below 1 ULP of p


@both
def test_padding_adds_nothing(f):
    """A class at -inf in both, kept or in the rest; a whole rest at -inf; a kept class at -inf in the teacher alone."""
    values, indices, rest = kept(TEACHER, 3, 1.0)
    student = np.concatenate([STUDENT, np.full((6, 2), -np.inf)], -1)
    want = value_and_slope(f, STUDENT, values, indices, rest)
    longer = np.concatenate([values, np.full((6, 1), -np.inf)], -1), np.concatenate([indices, np.full((6, 1), 9)], -1)
    for got in (
        value_and_slope(f, student, values, indices, rest),
        value_and_slope(f, student, *longer, rest),
    ):
        assert ulps(got[0], want[0], "float64") <= 16
        assert ulps(got[1][:, :CLASSES], want[1], "float64") <= 64
        assert not got[1][:, CLASSES:].any()
    value, slope = value_and_slope(
        f, student[:, [0, 1, 9, 10]], values[:, :2], indices[:, :2] * 0 + [0, 1], rest - np.inf
    )
    assert ulps(value, full(f, student[:, :2], values[:, :2], 1.0)[0], "float64") <= 16
    assert np.isfinite(slope).all()
    value, slope = value_and_slope(f, STUDENT, values - [0, 0, np.inf], indices, rest)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()


@both
def test_infinite_where_the_student_excludes_a_class(f):
    values, indices, rest = kept(TEACHER, 3, 1.0)
    student = STUDENT.copy()
    student[2, indices[2, 1]] = -np.inf
    student[4, np.setdiff1d(np.arange(CLASSES), indices[4])] = -np.inf
    value, slope = value_and_slope(f, student, values, indices, rest)
    assert np.array_equal(np.isinf(value), np.isin(np.arange(6), [2, 4]))
    assert np.isfinite(slope).all()


@both
def test_a_class_that_is_there_twice_gives_nan(f):
    values, indices, rest = kept(TEACHER, 3, 1.0)
    indices[1, 2] = indices[1, 0]
    for tail in ("bucket", "renormalize"):
        value, _ = value_and_slope(f, STUDENT, values, indices, rest, tail=tail)
        assert np.array_equal(np.isnan(value), np.arange(6) == 1)


def test_a_class_out_of_range():
    values, indices, rest = kept(TEACHER, 3, 1.0)
    indices[1, 2] = CLASSES
    value, _ = value_and_slope(JAX, STUDENT, values, indices, rest)
    assert np.array_equal(np.isnan(value), np.arange(6) == 1)
    with pytest.raises(IndexError, match=r"`indices` must lie in 0 .. 8, got 9"):
        value_and_slope(BOTH[1], STUDENT, values, indices, rest)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tail": "drop"}, ValueError, '`tail` must be one of "bucket", "renormalize", got \'drop\''),
        ({"tail": None}, ValueError, '`tail` must be one of "bucket", "renormalize", got None'),
        ({"rest": None}, ValueError, r'`rest` must be given with tail="bucket" where 3 of 9 .*by tail="renormalize"'),
        ({"rest": np.ones((6, 1))}, TypeError, r"`rest` must be Float\[Array, '\*batch'\].*, got float64\[6, 1\]"),
        ({"values": np.ones((6, 2))}, TypeError, r"`indices` must be .*got int(32|64)\[6, 3\] beside"),
        ({"student_logits": np.ones((6, 2))}, ValueError, "`indices` must hold from 1 to 2 classes .*, got 3"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be finite and greater than 0"),
    ],
)
def test_mistakes(change, error, message):
    said = []
    for f in BOTH:
        values, indices, rest = kept(TEACHER, 3, 1.0)
        given = {"student_logits": STUDENT, "values": values, "indices": indices, "rest": rest} | change
        given = {k: f.array(x) if isinstance(x, np.ndarray) else x for k, x in given.items()}
        with pytest.raises(error, match=message) as raised:
            f.kd.topk_kl_loss(**given)
        said.append(str(raised.value).replace("int64", "int32"))
    assert said[0] == said[1]


def test_without_a_rest_renormalising_knows_any_temperature():
    values, indices, _ = kept(TEACHER, 3, 1.0)
    student = np.take_along_axis(STUDENT, indices, -1)
    for f in BOTH:
        got, _ = value_and_slope(f, STUDENT, values, indices, temperature=2.5, tail="renormalize")
        assert ulps(got, full(f, student, values, 2.5)[0], "float64") <= 16
    assert JAX.kd.topk_kl_loss(*map(jnp.asarray, (STUDENT, values, indices)), tail="renormalize").shape == ()
