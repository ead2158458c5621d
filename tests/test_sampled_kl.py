"""Sampled KL: comparison with exact sums over a small vocabulary, edge cases, and invalid log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import JAX, TORCH
from tiers import first

import kdtorch

both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
STUDENT, TEACHER, OLDER = 1.5 * np.random.default_rng(0).normal(size=(3, 6))


def log_softmax(f, logits):
    return jax.nn.log_softmax(logits) if f is JAX else torch.log_softmax(logits, -1)


def mean(f, sampler, *behavior, **options):
    """The exact mean of the loss over tokens that a policy samples, and the mean gradient for the student's logits."""
    log_q, weights = (log_softmax(f, f.array(x)) for x in (TEACHER, sampler))
    behavior = [log_softmax(f, f.array(x)) for x in behavior]

    def loss(logits):
        values = f.kd.sampled_kl_loss(log_softmax(f, logits), log_q, *behavior, reduction="none", **options)
        value = (weights.exp() if f is TORCH else jnp.exp(weights)) @ values
        return value, value

    gradient, value = f.jit(f.grad(loss, has_aux=True))(f.array(STUDENT))
    return f.numpy(value), f.numpy(gradient)


def divergence(f, name):
    student, teacher = f.array(STUDENT), f.array(TEACHER)

    def loss(logits):
        value = getattr(f.kd, name)(logits, teacher)
        return value, value

    gradient, value = f.jit(f.grad(loss, has_aux=True))(student)
    return f.numpy(value), f.numpy(gradient)


@both
def test_means_over_the_students_tokens(f):
    reverse, slope = divergence(f, "reverse_kl_loss")
    for estimator in ("k1", "k2", "k3"):
        value, score = mean(f, STUDENT, estimator=estimator)
        assert (value == pytest.approx(reverse, rel=1e-12)) == (estimator != "k2")
        np.testing.assert_allclose(score, slope, atol=1e-14)
    np.testing.assert_allclose(mean(f, STUDENT, estimator="k1", gradient="direct")[1], 0, atol=1e-14)
    np.testing.assert_allclose(mean(f, STUDENT, estimator="k2", gradient="direct")[1], slope, atol=1e-14)
    np.testing.assert_allclose(mean(f, STUDENT, gradient="direct")[1], divergence(f, "kl_loss")[1], atol=1e-14)


@both
def test_means_over_the_teachers_tokens(f):
    forward, slope = divergence(f, "kl_loss")
    for estimator in ("k1", "k3"):
        value, gradient = mean(f, TEACHER, estimator=estimator, sampled_from="teacher")
        assert value == pytest.approx(forward, rel=1e-12)
        np.testing.assert_allclose(gradient, slope, atol=1e-14)


@both
def test_tokens_of_an_older_student(f):
    """The weights correct for them; a bound that limits weights does not, and a bound that limits none changes
    nothing."""
    reverse, slope = divergence(f, "reverse_kl_loss")
    for options in ({"estimator": "k1"}, {}, {"max_ratio": 1e3}, {"max_ratio": 0.5}):
        value, gradient = mean(f, OLDER, OLDER, **options)
        right = options.get("max_ratio") != 0.5
        assert (value == pytest.approx(reverse, rel=1e-12)) == right
        assert np.allclose(gradient, slope, atol=1e-14) == right


@both
def test_without_a_policy_of_its_own_the_student_has_sampled(f):
    """The weight is then exactly 1."""
    log_p, log_q = f.arrays(list(-np.random.default_rng(1).exponential(size=(2, 3, 4))))
    for options in ({}, {"estimator": "k2"}, {"gradient": "direct"}):
        alone, with_it = (f.kd.sampled_kl_loss(log_p, log_q, *x, reduction="none", **options) for x in ((), (log_p,)))
        assert np.array_equal(f.numpy(alone), f.numpy(with_it))


def evaluated(f, log_p, log_q, *behavior, dtype="float32", **options):
    """The values and gradients of tokens."""
    log_p, log_q, *behavior = f.arrays([np.array(x) for x in (log_p, log_q, *behavior)], dtype)

    def loss(log_p):
        values = f.kd.sampled_kl_loss(log_p, log_q, *behavior, reduction="none", **options)
        return values.sum(), values

    gradient, values = f.jit(f.grad(loss, has_aux=True))(log_p)
    return f.numpy(values), f.numpy(gradient)


EXCLUDED = -np.inf
FORMS = [{"estimator": k, "gradient": g} for k in ("k1", "k2", "k3") for g in ("score", "direct")]


@both
def test_an_excluded_token(f):
    """NaN if a model gives -inf to a token that it sampled; inf, with a gradient away from the token, if the other
    does."""
    log_p, log_q = [EXCLUDED, -1.0, EXCLUDED, -1.0], [-1.0, EXCLUDED, EXCLUDED, -1.0]
    for options in FORMS:
        values, gradient = evaluated(f, log_p, log_q, **options)
        np.testing.assert_array_equal(values, [np.nan, np.inf, np.nan, 0])
        assert np.isnan(gradient[[0, 2]]).all()
        assert np.isfinite(gradient[[1, 3]]).all()
        assert gradient[1] > 0
        kept = f.array(np.array([False, True, False, True]))
        values, gradient = evaluated(f, log_p, log_q, where=kept, **options)
        np.testing.assert_array_equal(values, [0, np.inf, 0, 0])
        assert np.array_equal(gradient == 0, [True, False, True, gradient[3] == 0])
        if options["gradient"] == "direct":
            values, gradient = evaluated(f, log_p, log_q, sampled_from="teacher", **options)
            np.testing.assert_array_equal(values, [np.inf, np.nan, np.nan, 0])
            assert gradient[0] < 0
            assert np.isfinite(gradient[[0, 3]]).all()
    values, _ = evaluated(f, [-1.0, -1.0], [-1.0, -2.0], [EXCLUDED, -1.0], max_ratio=2.0)
    np.testing.assert_array_equal(np.isnan(values), [True, False])


@both
def test_numbers_beyond_the_dtype(f):
    """A result is infinite only if the estimate itself overflows, not if a factor of it does."""
    for far, finite in ((-87.0, True), (-90.0, False)):
        (value,), (gradient,) = evaluated(f, [far - 1.0], [-1.0])
        assert np.isfinite(value) == finite
        assert gradient == far
        (_,), (gradient,) = evaluated(f, [far - 1.0], [-1.0], gradient="direct")
        assert np.isfinite(gradient) == finite
        (_,), (gradient,) = evaluated(f, [far - 1.0], [-1.0], dtype="float16", gradient="direct")
        assert np.isneginf(gradient)  # an overflow in float16 in any case, but not NaN
    for estimator, want in (("k1", 0.0), ("k2", 0.0), ("k3", np.exp(1.0))):  # e^-299 times 299, its square, and e^300
        values, gradient = evaluated(f, [-300.0], [0.0], [-1.0], estimator=estimator)
        np.testing.assert_allclose(values, want, rtol=1e-6)
        assert gradient == 0
    values, gradient = evaluated(f, [-1.0, -1.0], [-1.0, -2.0], [-1e4, -1e4])  # weights of e^9999
    np.testing.assert_array_equal(values, [0, np.inf])
    np.testing.assert_array_equal(gradient, [0, np.inf])


@both
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_what_is_no_logarithm_of_a_probability(f):
    """An error that names the argument in eager kdtorch, NaN elsewhere; masked tokens and rounding are allowed."""
    names, kept = ("student_log_probs", "teacher_log_probs", "behavior_log_probs"), np.array([True, True, False])
    compile_it = jax.jit if f is JAX else torch.compile(backend="eager", fullgraph=True)
    compiled = compile_it(lambda given: f.kd.sampled_kl_loss(**given, reduction="none"))
    for name in names:
        given = f.arrays({k: np.array([-1.0, -2.0, 0.3 if k == name else -0.5]) for k in names})
        if f is TORCH:
            with pytest.raises(
                ValueError, match=rf"^`{name}` must be logarithms of probabilities, at most 0, got 0.3; "
            ):
                f.kd.sampled_kl_loss(**given)
        assert np.array_equal(np.isnan(f.numpy(compiled(given))), ~kept)
        assert np.isfinite(f.numpy(f.kd.sampled_kl_loss(**given, where=f.array(kept))))
    for dtype, most in (("float64", 1e-5), ("float32", 1e-5), ("float16", 0.01), ("bfloat16", 0.1)):
        log_p, log_q = f.arrays([np.array([most, -1.0]), np.array([-1.0, most])], dtype)
        assert np.isfinite(f.numpy(f.kd.sampled_kl_loss(log_p, log_q)))


def test_it_is_nan_under_the_transforms_of_torch():
    log_p = torch.tensor([[-1.0, 0.5], [-1.0, -2.0]])
    values = torch.func.vmap(lambda x: kdtorch.sampled_kl_loss(x, x, reduction="none"))(log_p)
    assert torch.equal(values.isnan(), log_p > 0)
    gradient = torch.func.grad(lambda x: kdtorch.sampled_kl_loss(x, x))(log_p)
    assert torch.equal(gradient.isnan(), log_p > 0)


@both
def test_second_derivatives(f):
    """With constant weights; the gradient with "score" is constant, so its derivative is 0."""
    log_p, log_q, log_b = -1.3, -0.4, -0.9

    def curvature(log_q=log_q, **options):
        others = f.arrays([np.array(x) for x in (log_q, log_b)])

        def value(x):
            return f.kd.sampled_kl_loss(x, *others, **options)

        return float(f.jit(f.grad(f.grad(value)))(f.array(np.array(log_p))))

    weight = np.exp(log_p - log_b)
    assert curvature() == curvature(estimator="k1", gradient="direct") == 0
    assert curvature(estimator="k2", gradient="direct") == pytest.approx(weight)
    for other in (-0.4, -1.2, -5.0):
        assert curvature(other, gradient="direct") == pytest.approx(weight * np.exp(other - log_p))
        assert curvature(other, sampled_from="teacher") == pytest.approx(weight * np.exp(log_p - other))
    log_p, log_q, log_b = -4.0, -0.5, -3.0  # e^z is large
    weight = np.exp(log_p - log_b)
    assert curvature(log_q, gradient="direct") == pytest.approx(weight * np.exp(log_q - log_p))
