"""Tests specific to `topk_kl_loss`; properties and the comparison with the oracle are tested for all losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import BOTH, JAX, TORCH
from tiers import first, slow

from parity.compare import ulps

RNG = np.random.default_rng(0)
CLASSES = 9
STUDENT, TEACHER = (3 * RNG.normal(size=(6, CLASSES)) for _ in range(2))
both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)


def kept(teacher, top_k, temperature):
    """The logits, classes and rest that a cache would record, with the rest in float32."""
    indices = np.argsort(-teacher, axis=-1)[..., :top_k]
    others = teacher.copy()
    np.put_along_axis(others, indices, -np.inf, -1)
    rest = temperature * np.logaddexp.reduce(others / temperature, -1)
    return np.take_along_axis(teacher, indices, -1), indices, rest.astype(np.float32).astype(np.float64)


def value_and_slope(f, student, *teacher, dtype="float64", name="topk_kl_loss", **options):
    """The value of each example, and the gradient of their sum."""

    def total(x, *teacher):
        values = getattr(f.kd, name)(x, *teacher, reduction="none", **options)
        return values.sum(), values

    slope, values = f.jit(f.grad(total, has_aux=True))(*f.arrays([student, *teacher], dtype))
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


DIVERGENCES = [
    ({"divergence": "reverse_kl"}, "reverse_kl_loss", {}),
    ({"divergence": "jsd"}, "jsd_loss", {}),
    ({"divergence": "jsd", "beta": 0.1}, "jsd_loss", {"beta": 0.1}),
    ({"divergence": "jsd", "beta": 0}, "jsd_loss", {"beta": 0}),
    ({"divergence": "jsd", "beta": 1}, "jsd_loss", {"beta": 1}),
]
divergences = pytest.mark.parametrize(
    ("settings", "name", "same"), DIVERGENCES, ids=["reverse_kl", "jsd", "jsd-0.1", "jsd-0", "jsd-1"]
)


@both
@divergences
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_all_classes_are_the_full_loss_of_that_name(f, settings, name, same, tail):
    values, indices, _ = kept(TEACHER, CLASSES, 2.0)
    got = value_and_slope(f, STUDENT, values, indices, temperature=2.0, tail=tail, **settings)
    want = value_and_slope(f, STUDENT, TEACHER, name=name, temperature=2.0, **same)
    for a, b in zip(got, want, strict=True):
        assert ulps(a, b, "float64") <= 16


@both
@divergences
def test_every_divergence_of_a_bucket_is_that_of_the_classes_and_the_rest(f, settings, name, same):
    """It is the full loss of k + 1 classes, the last one a log-sum-exp, and a lower bound of the loss of all
    classes."""
    values, indices, rest = kept(TEACHER, 3, 2.0)
    others = STUDENT.copy()
    np.put_along_axis(others, indices, -np.inf, -1)
    together = 2 * np.log(np.exp(others / 2).sum(-1, keepdims=True))
    student = np.concatenate([np.take_along_axis(STUDENT, indices, -1), together], -1)
    teacher = np.concatenate([values, rest[:, None]], -1)
    got = value_and_slope(f, STUDENT, values, indices, rest, temperature=2.0, **settings)
    want = value_and_slope(f, student, teacher, name=name, temperature=2.0, **same)
    assert ulps(got[0], want[0], "float64") <= 64
    assert ulps(np.take_along_axis(got[1], indices, -1), want[1][:, :-1], "float64") <= 64
    assert (got[0] <= value_and_slope(f, STUDENT, TEACHER, name=name, temperature=2.0, **same)[0]).all()
    renormalized = value_and_slope(f, STUDENT, values, indices, temperature=2.0, tail="renormalize", **settings)
    want = value_and_slope(f, student[:, :-1], values, name=name, temperature=2.0, **same)
    assert ulps(renormalized[0], want[0], "float64") <= 64
    assert ulps(np.take_along_axis(renormalized[1], indices, -1), want[1], "float64") <= 64


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_rest_of_minus_infinity_is_the_whole_student_against_the_kept_classes(f, dtype):
    """As in axolotl and DistillKit: sum q (log q - log p), with q normalised over the kept classes and p over all."""
    values, indices, rest = kept(TEACHER, 3, 2.0)
    rest = rest - np.inf
    log_p = STUDENT / 2 - np.log(np.exp(STUDENT / 2).sum(-1, keepdims=True))
    log_p = np.take_along_axis(log_p, indices, -1)
    q = np.exp(values / 2)
    q /= q.sum(-1, keepdims=True)
    value, slope = value_and_slope(f, STUDENT, values, indices, rest, temperature=2.0, dtype=dtype)
    assert ulps(value, 4 * (q * (np.log(q) - log_p)).sum(-1), dtype) <= 16
    want = np.exp(STUDENT / 2)
    want /= want.sum(-1, keepdims=True)
    np.put_along_axis(want, indices, np.take_along_axis(want, indices, -1) - q, -1)
    assert ulps(slope, 2 * want, dtype) <= 16
    value, slope = value_and_slope(f, STUDENT, values, indices, rest, temperature=2.0, dtype=dtype, divergence="jsd")
    m = (q + np.exp(log_p)) / 2
    alone = 1 - np.exp(log_p).sum(-1)
    want = (q * np.log(q / m) + np.exp(log_p) * (log_p - np.log(m))).sum(-1) + alone * np.log(2)
    assert ulps(value, want / 2, dtype) <= 16
    assert np.isfinite(slope).all()
    value, slope = value_and_slope(f, STUDENT, values, indices, rest, dtype=dtype, divergence="reverse_kl")
    assert np.isposinf(value).all()
    assert np.isfinite(slope).all()
    assert (np.take_along_axis(slope, indices, -1) < 0).all()  # it pulls the student towards the kept classes


@both
@divergences
def test_the_derivatives_of_every_divergence(f, settings, name, same):
    """The first with respect to the temperature, and the second for the student, equal central differences."""
    values, indices, rest = kept(TEACHER, 3, 2.0)
    student, way, *teacher = f.arrays([STUDENT, RNG.normal(size=STUDENT.shape), values, indices, rest])

    def loss(x, t):
        return f.kd.topk_kl_loss(x, *teacher, temperature=t, **settings)

    h, at = 1e-5, f.array(np.array(2.0))
    got = f.numpy(f.grad(lambda t: loss(student, t))(at))
    want = (float(loss(student, 2 + h)) - float(loss(student, 2 - h))) / (2 * h)
    assert abs(got - want) <= 1e-8 * max(1, abs(want))
    slope = f.grad(lambda x: loss(x, 2.0))
    want = (f.numpy(slope(student + h * way)) - f.numpy(slope(student - h * way))) / (2 * h)
    assert np.abs(f.numpy(f.grad(lambda x: (slope(x) * way).sum())(student)) - want).max() <= 1e-8


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
    """In float32, 1 minus the sum of the kept probabilities would be 0."""
    student, teacher = np.array([[20.0, 0.0, -1.0, -2.0]]), np.array([[25.0, 0.0, -3.0, -2.0]])
    values, indices = teacher[:, :1], np.array([[0]])
    rest = np.log(np.exp(teacher[:, 1:]).sum(-1))
    wide = value_and_slope(f, student, values, indices, rest)
    narrow = value_and_slope(f, student, values, indices, rest, dtype="float32")
    assert 0 < wide[0][0] < 1e-7
    assert ulps(narrow[0], wide[0], "float32") <= 32
    assert (
        ulps(narrow[1][:, 1:], wide[1][:, 1:], "float32") <= 32
    )  # the rest; p - q at the kept class is below 1 ULP of p


@both
def test_padding_adds_nothing(f):
    """A class at -inf in both, kept or in the rest; a rest at -inf; a kept class at -inf only in the teacher."""
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


def ragged(rng, values, indices):
    """Entries mixed with padding of several kinds, and where the entries are: equally many in each example."""
    number, k = indices.shape
    kept = np.arange(k + 4) < k
    kept = np.stack([rng.permutation(kept) for _ in range(number)])
    more_values, more_indices = (
        rng.choice([np.nan, np.inf, -np.inf, 0.0, 99.0], kept.shape),
        rng.choice([-1, -100, CLASSES, 10**6, 0, 3], kept.shape),
    )
    for new, old in ((more_values, values), (more_indices, indices)):
        new[kept] = old.ravel()
    return more_values, more_indices, kept


TAILS = [("bucket", 1.0), ("bucket", 4.0), ("renormalize", 2.5)]


@both
@pytest.mark.parametrize(("tail", "temperature"), TAILS)
def test_an_entry_that_is_not_kept_is_as_if_it_were_not_there(f, tail, temperature):
    """It may be NaN, out of range, or a class that occurs already; there may be more entries than classes."""
    for k in (3, 7):
        values, indices, rest = kept(TEACHER, k, temperature)
        more_values, more_indices, where = ragged(RNG, values, indices)
        want = value_and_slope(f, STUDENT, values, indices, rest, tail=tail, temperature=temperature)
        got = value_and_slope(
            f, STUDENT, more_values, more_indices, rest, tail=tail, temperature=temperature, kept=f.array(where)
        )
        for a, b in zip(got, want, strict=True):
            assert ulps(a, b, "float64") <= 16
    values, indices, rest = kept(TEACHER, CLASSES, temperature)
    more_values, more_indices, where = ragged(RNG, values, indices)
    got = value_and_slope(
        f, STUDENT, more_values, more_indices, rest, tail=tail, temperature=temperature, kept=f.array(where)
    )
    for a, b in zip(got, full(f, STUDENT, TEACHER, temperature), strict=True):
        assert ulps(a, b, "float64") <= 16


@both
@pytest.mark.parametrize(("tail", "temperature"), TAILS)
def test_the_order_of_the_entries_says_nothing(f, tail, temperature):
    values, indices, rest = kept(TEACHER, 4, temperature)
    values, indices, where = ragged(RNG, values, indices)
    order = RNG.random(where.shape).argsort(-1)
    want = value_and_slope(f, STUDENT, values, indices, rest, tail=tail, temperature=temperature, kept=f.array(where))
    values, indices, where = (np.take_along_axis(x, order, -1) for x in (values, indices, where))
    got = value_and_slope(f, STUDENT, values, indices, rest, tail=tail, temperature=temperature, kept=f.array(where))
    for a, b in zip(got, want, strict=True):
        assert ulps(a, b, "float64") <= 16


@both
def test_an_example_of_which_nothing_is_kept(f):
    """With only the rest, there is one class, on which both agree; without any class there is no distribution."""
    values, indices, rest = kept(TEACHER, 3, 1.0)
    where = np.arange(6)[:, None] * np.ones(3, int) != 2
    value, slope = value_and_slope(f, STUDENT, values, indices, rest, kept=f.array(where))
    assert value[2] == 0
    assert not slope[2].any()
    assert value[[0, 1, 3, 4, 5]].all()
    for given in ({"rest": rest - np.inf}, {"rest": rest, "tail": "renormalize"}):
        options = {k: v for k, v in given.items() if k == "tail"}
        value, slope = value_and_slope(f, STUDENT, values, indices, given["rest"], kept=f.array(where), **options)
        assert np.isnan(value[2])
        assert np.isfinite(value[[0, 1, 3, 4, 5]] if options else 0.0).all()
        masked = f.array(np.arange(6) != 2)
        value, slope = value_and_slope(
            f, STUDENT, values, indices, given["rest"], kept=f.array(where), where=masked, **options
        )
        assert value[2] == 0
        assert not slope[2].any()


@both
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_no_distribution_is_nan(f, tail):
    """A student that is all -inf, or a teacher's entries and rest, gives NaN in value and gradient, unless it is
    masked."""
    values, indices, rest = kept(TEACHER, 3, 1.0)
    student, others = STUDENT.copy(), np.arange(6) != 2
    student[2] = -np.inf
    no_values, no_rest = (np.where(np.reshape(others, (6,) + (1,) * (x.ndim - 1)), x, -np.inf) for x in (values, rest))
    for given in (
        (student, values, indices, rest),
        (STUDENT, no_values, indices, no_rest),
        (student, no_values, indices, no_rest),
    ):
        value, slope = value_and_slope(f, *given, tail=tail)
        assert np.array_equal(np.isnan(value), ~others)
        assert np.isnan(slope[2][indices[2]]).all()
        assert np.isfinite(slope[others]).all()
        value, slope = value_and_slope(f, *given, tail=tail, where=f.array(others))
        assert np.isfinite(value).all()
        assert np.isfinite(slope).all()
        assert value[2] == 0
        assert not slope[2].any()


@pytest.mark.slow
@both
@pytest.mark.parametrize(("tail", "temperature"), TAILS)
def test_the_gradient_of_the_temperature(f, tail, temperature):
    """It equals central differences with a fixed rest."""
    values, indices, rest = kept(TEACHER, 3, temperature)
    more = ragged(RNG, values, indices)
    where = f.array(np.arange(6) != 4)
    for entries, options in (((values, indices), {}), (more[:2], {"kept": f.array(more[2]), "where": where})):
        arrays = f.arrays([STUDENT, *entries, rest])

        def loss(t, arrays=arrays, options=options):
            return f.kd.topk_kl_loss(*arrays, temperature=t, tail=tail, **options)

        h = 1e-5
        want = [float(loss(temperature + x)) for x in (h, -h)]
        got = f.numpy(f.grad(loss)(f.array(np.array(temperature))))
        assert abs(got - (want[0] - want[1]) / (2 * h)) <= 1e-8 * max(1, abs(got))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_what_is_held_until_the_backward_pass(tail, dtype):
    """Only the gradient is stored, in the student's dtype; the teacher may change, or come from inference mode."""
    values, indices, rest = kept(TEACHER, 3, 2.0)
    student, *teacher = TORCH.arrays([STUDENT, values, indices, rest], dtype)
    student.requires_grad_()
    every = *teacher, torch.from_numpy(np.arange(6) != 4), torch.from_numpy(np.arange(18).reshape(6, 3) % 7 != 1)

    def loss(values, indices, rest, where=None, kept=None):
        options = {"temperature": 2.0, "tail": tail, "where": where, "kept": kept}
        return TORCH.kd.topk_kl_loss(student, values, indices, rest, **options)

    def slope(value):
        return torch.autograd.grad(1000 * value, student)[0]

    for inputs in (every, every[:3]):
        want = slope(loss(*inputs))
        assert want.dtype == student.dtype
        with torch.inference_mode():
            given = [x.clone() for x in inputs]
        assert torch.equal(slope(loss(*given)), want)
        given, held = [x.clone() for x in inputs], []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.nbytes) or x, lambda x: x):
            value = loss(*given)
        for x in given:
            x.fill_(torch.nan if x.is_floating_point() else 1)
        assert torch.equal(slope(value), want)
        entries = student.nbytes if tail == "bucket" else 18 * (student.itemsize + 8)
        rows = 6 * (1 + 4 * (dtype == "float16")) + 8  # the mask, float16's unit, the mean's number
        assert sum(held) <= entries + rows, held


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_holds_the_gradient_in_the_dtype_of_the_student(dtype):
    values, indices, rest = kept(TEACHER, 3, 2.0)
    student, *teacher = JAX.arrays([STUDENT, values, indices, rest], dtype)
    for tail, most in (("bucket", student.nbytes), ("renormalize", 18 * (student.itemsize + 4 + 4 + 1))):
        _, pull = jax.vjp(lambda x, tail=tail: JAX.kd.topk_kl_loss(x, *teacher, temperature=2.0, tail=tail), student)
        held = [x.nbytes for x in jax.tree.leaves(pull) if x.ndim]
        assert 0 < sum(held) <= most + 5 * 6 * 8, held


@pytest.mark.slow
@both
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("classes", [4, CLASSES])
def test_the_second_derivative(f, tail, classes):
    """It equals central differences of the gradient, also with one other class, whose weight is exactly 1."""
    teacher = kept(TEACHER[:, :classes], 3, 2.0)
    student, way, *teacher = f.arrays([STUDENT[:, :classes], RNG.normal(size=(6, classes)), *teacher])
    slope = f.grad(lambda x: f.kd.topk_kl_loss(x, *teacher, temperature=2.0, tail=tail))
    h = 1e-5
    want = (f.numpy(slope(student + h * way)) - f.numpy(slope(student - h * way))) / (2 * h)
    got = f.numpy(f.grad(lambda x: (slope(x) * way).sum())(student))
    assert np.abs(got - want).max() <= 1e-8


@pytest.mark.slow
@both
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_under_vmap(f, tail):
    """`vmap` over any one of the inputs, with the others fixed."""
    values, indices, rest = kept(TEACHER, 3, 2.0)
    given = f.arrays([STUDENT, values, indices, rest, np.arange(18).reshape(6, 3) % 7 != 1])
    vmap, stack = (jax.vmap, jnp.stack) if f is JAX else (torch.func.vmap, torch.stack)

    def loss(student, values, indices, rest, where):
        return f.kd.topk_kl_loss(student, values, indices, {"2.0": rest}, temperature=2.0, tail=tail, kept=where)

    slope = f.grad(loss)
    want = f.numpy(slope(*given))
    for place in range(5):
        dims = tuple(0 if i == place else None for i in range(5))
        stacked = [stack([x, x]) if i == place else x for i, x in enumerate(given)]
        got = f.numpy(vmap(slope, dims)(*stacked))
        assert np.abs(got - want).max() <= 1e-14


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_under_torch_compile(tail):
    values, indices, rest = kept(TEACHER, 3, 2.0)
    student, values, indices, rest, where = TORCH.arrays(
        [STUDENT, values, indices, rest, np.arange(18).reshape(6, 3) % 7 != 1]
    )
    student.requires_grad_()

    def loss(rest, **options):
        return TORCH.kd.topk_kl_loss(student, values, indices, rest, tail=tail, **options)

    for given in (rest, {"2.0": rest}):
        for temperature in (2.0, torch.tensor(2.0)):
            torch.compiler.reset()
            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
            for options in ({}, {"kept": where}):
                options = options | {"temperature": temperature}
                got, want = (
                    torch.autograd.grad(function(given, **options), student)[0] for function in (compiled, loss)
                )
                assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def test_a_class_out_of_range():
    values, indices, rest = kept(TEACHER, 3, 1.0)
    indices[1, 2] = CLASSES
    value, _ = value_and_slope(JAX, STUDENT, values, indices, rest)
    assert np.array_equal(np.isnan(value), np.arange(6) == 1)
    with pytest.raises(IndexError, match=r"`indices` must be in 0 .. 8, got 9"):
        value_and_slope(TORCH, STUDENT, values, indices, rest)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rest": None, "kept": np.ones((6, 3), bool)}, ValueError, "`rest` must be given"),
        (
            {"kept": np.ones((6, 2), bool)},
            TypeError,
            r"`kept` must be Bool\[Array, '\*batch kept'\].*, got bool\[6, 2\] beside",
        ),
        ({"kept": np.ones((6, 3))}, TypeError, r"`kept` must be .*, got float64\[6, 3\] .*; give kept != 0"),
        ({"rest": {"1.0": np.ones((6, 1))}}, TypeError, r'`rest(\["1.0"\])?` must be .*'),
        (
            {"rest": {"4.0": np.ones(6), "0.5": np.ones(6)}},
            ValueError,
            r"`rest` was recorded for the temperatures \[0.5, 4.0\], got `temperature` 1.0; read it",
        ),
        (
            {"rest": {"4.0": np.ones(6)}, "tail": "renormalize"},
            ValueError,
            r"`rest` was recorded for the temperatures \[4.0\], got `temperature` 1.0; .* give no rest, with tail",
        ),
        ({"rest": {"x": np.ones(6)}, "tail": "renormalize"}, ValueError, r"`rest` must be .*, got the names \['x'\]"),
        ({"rest": np.ones((6, 1)), "tail": "renormalize"}, TypeError, r"`rest` must be .*, got float64\[6, 1\]"),
        ({"rest": {"x": np.ones(6)}}, ValueError, r"`rest` must be "),
        ({"rest": {}}, ValueError, r"`rest` was recorded for the temperatures \[\]"),
        ({"tail": "drop"}, ValueError, '`tail` must be one of "bucket", "renormalize", got \'drop\''),
        ({"tail": None}, ValueError, '`tail` must be one of "bucket", "renormalize", got None'),
        ({"rest": None}, ValueError, r'`rest` must be given with tail="bucket" where 3 of 9 .*by tail="renormalize"'),
        ({"rest": np.ones((6, 1))}, TypeError, r"`rest` must be Float\[Array, '\*batch'\].*, got float64\[6, 1\]"),
        ({"values": np.ones((6, 2))}, TypeError, r"`indices` must be .*got int(32|64)\[6, 3\] beside"),
        ({"student_logits": np.ones((6, 2))}, ValueError, "`indices` must hold from 1 to 2 classes .*, got 3"),
        ({"divergence": "js"}, ValueError, '`divergence` must be one of "kl", "reverse_kl", "jsd", got \'js\''),
        ({"divergence": "jsd", "beta": 1.5}, ValueError, "`beta` must be between 0 and 1, got 1.5"),
        ({"divergence": "jsd", "beta": "half"}, TypeError, "`beta` must be a number, got 'half'"),
        ({"temperature": -1.0}, ValueError, "`temperature` must be finite and greater than 0"),
    ],
)
def test_mistakes(change, error, message):
    said = []
    for f in BOTH:
        values, indices, rest = kept(TEACHER, 3, 1.0)
        given = {"student_logits": STUDENT, "values": values, "indices": indices, "rest": rest} | change
        given = {k: f.arrays(x) if isinstance(x, np.ndarray | dict) else x for k, x in given.items()}
        with pytest.raises(error, match=message) as raised:
            f.kd.topk_kl_loss(**given)
        said.append(str(raised.value).replace("int64", "int32"))
    assert said[0] == said[1]


@both
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_rest_of_another_temperature_is_nan_where_the_temperature_is_an_array(f, tail):
    values, indices, rest = map(f.array, kept(TEACHER, 3, 4.0))
    for temperature, refused in ((4.0, False), (2.5, True)):
        given = f.array(np.array(temperature))
        got = f.kd.topk_kl_loss(f.array(STUDENT), values, indices, {"4.0": rest}, temperature=given, tail=tail)
        assert np.isnan(f.numpy(got)) == refused


def test_without_a_rest_renormalising_knows_any_temperature():
    values, indices, _ = kept(TEACHER, 3, 1.0)
    student = np.take_along_axis(STUDENT, indices, -1)
    for f in BOTH:
        got, _ = value_and_slope(f, STUDENT, values, indices, temperature=2.5, tail="renormalize")
        assert ulps(got, full(f, student, values, 2.5)[0], "float64") <= 16
    assert JAX.kd.topk_kl_loss(*map(jnp.asarray, (STUDENT, values, indices)), tail="renormalize").shape == ()
