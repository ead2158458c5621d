"""Edge cases of feature losses that the properties of all losses do not cover."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from frameworks import JAX, TORCH
from tiers import first

from parity.compare import ulps

RNG = np.random.default_rng(0)
both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
INFINITE = -np.inf


def value_and_slopes(f, name, inputs, learns=(0,), dtype="float64", **options):
    """The value with `"none"` and the gradients of its sum, in NumPy; maps have their channels second."""
    options |= {"channel_axis": 1} if name != "cosine_loss" else {}
    arrays = [f.arrays(x, dtype) for x in inputs]

    def objective(free):
        given = [free.get(i, x) for i, x in enumerate(arrays)]
        value = getattr(f.kd, name)(*given, reduction="none", **options)
        return value.sum(), value

    slopes, value = f.jit(f.grad(objective, has_aux=True))({i: arrays[i] for i in learns})
    slopes = [slopes[i] for i in learns]
    return f.numpy(value), [[f.numpy(y) for y in x] if isinstance(x, list) else f.numpy(x) for x in slopes]


def cosine(s, t):
    """The cosine distance in 80 bits."""
    s, t = s.astype(np.longdouble), t.astype(np.longdouble)
    u, v = (x / np.sqrt((x * x).sum(-1, keepdims=True)) for x in (s, t))
    cos = (u * v).sum(-1, keepdims=True)
    return ((u - v) ** 2).sum(-1) / 2, (cos * u - v) / np.sqrt((s * s).sum(-1, keepdims=True))


@both
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_cosine_of_close_features(f, distance):
    """The value is proportional to the squared distance, and keeps its digits in float32."""
    t = RNG.normal(size=(20, 64)).astype(np.float32)
    s = (t + distance * RNG.normal(size=t.shape)).astype(np.float32)
    value, (slope,) = value_and_slopes(f, "cosine_loss", (s, t), dtype="float32")
    want, slopes = cosine(s, t)
    assert (np.abs(value - want) <= 1e-5 * want).all()
    assert (np.abs(slope - slopes).max(-1) <= 1e-5 * np.abs(slopes).max(-1)).all()


@both
def test_cosine_at_its_limits(f):
    s = np.array([[3.0, 4], [3, 4], [3, 4], [0, 0], [3, 4], [0, 0], [3e-30, 4e-30], [6, 8]])
    t = np.array([[3.0, 4], [-3, -4], [4, -3], [1, 2], [0, 0], [0, 0], [3e30, 4e30], [3, 4]])
    for dtype in ("float64", "float32"):
        value, (slope,) = value_and_slopes(f, "cosine_loss", (s, t), dtype=dtype)
        np.testing.assert_allclose(value, [0, 2, 1, 1, 1, 1, 0, 0], atol=1e-6 if dtype == "float32" else 1e-15)
        assert value[0] == 0
        assert (slope[[0, 3, 4, 5]] == 0).all()
        assert np.isfinite(slope).all()


@both
def test_cwd_is_kl_over_positions(f):
    s, t = RNG.normal(size=(2, 3, 4, 5)), RNG.normal(size=(2, 3, 4, 5))
    value, (slope,) = value_and_slopes(f, "cwd_loss", (s, t), temperature=3.0)
    shifted, (same,) = value_and_slopes(f, "cwd_loss", (s + 8 * np.arange(3.0).reshape(3, 1, 1), t), temperature=3.0)
    rows = [f.array(x.reshape(2, 3, 20)) for x in (s, t)]
    want = f.numpy(f.kd.kl_loss(*rows, temperature=3.0, reduction="none")).mean(1)
    for a, b in ((value, want), (shifted, want), (same, slope)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@both
def test_cwd_of_few_positions(f):
    """With one position the loss is 0, and a position at -inf in both contributes nothing."""
    s, t = RNG.normal(size=(2, 3, 4, 5)), RNG.normal(size=(2, 3, 4, 5))
    value, (slope,) = value_and_slopes(f, "cwd_loss", (s[..., :1, :1], t[..., :1, :1]))
    assert (value == 0).all()
    assert (slope == 0).all()
    padded = [x.copy() for x in (s, t)]
    for x in padded:
        x[..., 3, :] = INFINITE
    want, (slopes,) = value_and_slopes(f, "cwd_loss", (s[..., :3, :], t[..., :3, :]))
    value, (slope,) = value_and_slopes(f, "cwd_loss", padded)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(slope[..., :3, :], slopes, rtol=1e-12, atol=1e-15)
    assert (slope[..., 3, :] == 0).all()
    value, (slope,) = value_and_slopes(f, "cwd_loss", (padded[0], t))
    assert np.isposinf(value).all()
    assert np.isfinite(slope).all()


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_vid_at_scales_of_a_hundred(f, dtype):
    """e^a overflows in float32, or is 0 compared with ε."""
    mean, t = (RNG.normal(size=(3, 4, 2, 3)).astype(np.float32).astype(float) for _ in range(2))
    scale = np.array([100.0, -100, 30, -30])
    value, (of_mean, of_scale) = value_and_slopes(f, "vid_loss", (mean, t, scale), (0, 2), dtype)
    a = scale.astype(np.longdouble)
    variance = (np.maximum(a, 0) + np.log1p(np.exp(-np.abs(a))) + 1e-5).reshape(4, 1, 1)
    error = mean - t.astype(np.longdouble)
    slopes = (1 / variance - error**2 / variance**2).sum((0, 2, 3)) / (1 + np.exp(-a)) / 48
    assert ulps(value, ((error**2 / variance + np.log(variance)).mean((1, 2, 3)) / 2).astype(float), dtype) <= 16
    assert ulps(of_mean, (error / variance / 24).astype(float), dtype) <= 16
    assert np.isfinite(of_scale).all()
    limit = 1e-5 if dtype == "float32" else 1e-12
    assert (np.abs(of_scale - slopes)[[0, 2, 3]] <= limit * np.abs(slopes)[[0, 2, 3]]).all()
    assert abs(of_scale[1] - slopes[1]) <= (1e-30 if dtype == "float32" else limit * abs(slopes[1]))  # it is 1e-34


def flow(maps, other):
    """The loss and its gradient in 80 bits, for maps of one size."""
    value, slopes = 0, [np.zeros(x.shape, np.longdouble) for x in maps]
    maps, other = ([x.astype(np.longdouble).reshape(*x.shape[:2], -1) for x in both] for both in (maps, other))
    for i in range(len(maps) - 1):
        (f, g), (h, k) = maps[i : i + 2], other[i : i + 2]
        apart = np.einsum("bcx,bdx->bcd", f, g) / f.shape[2] - np.einsum("bcx,bdx->bcd", h, k) / f.shape[2]
        value = value + (apart**2).mean((1, 2))
        weight = 2 * apart / apart[0].size / f.shape[2]
        slopes[i] += np.einsum("bcd,bdx->bcx", weight, g).reshape(slopes[i].shape)
        slopes[i + 1] += np.einsum("bcd,bcx->bdx", weight, f).reshape(slopes[i + 1].shape)
    return value, slopes


@both
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e8])
@pytest.mark.parametrize("distance", [1.0, 1e-4])
def test_fsp_of_three_maps(f, size, distance):
    """The middle map counts twice; close maps keep their digits in float32, and so do small and large ones."""
    t = [(size * RNG.normal(size=(2, c, 3, 4))).astype(np.float32) for c in (3, 4, 2)]
    s = [(x + distance * size * RNG.normal(size=x.shape)).astype(np.float32) for x in t]
    value, (slopes,) = value_and_slopes(f, "fsp_loss", (s, t), dtype="float32")
    want, want_slopes = flow(s, t)
    assert (np.abs(value - want) <= 1e-5 * want).all()
    for a, b in zip(slopes, want_slopes, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@both
def test_fsp_of_maps_of_several_dtypes(f):
    maps = [RNG.normal(size=(2, c, 3, 4)) for c in (3, 2)]
    other = [RNG.normal(size=x.shape) for x in maps]
    rounded = [maps[0].astype(ml_dtypes.bfloat16).astype(float), maps[1]]
    want, _ = value_and_slopes(f, "fsp_loss", (rounded, other))
    half = [f.array(maps[0], "bfloat16"), f.array(maps[1], "float64")]
    value = f.kd.fsp_loss(half, f.arrays(other), channel_axis=1, reduction="none")
    assert str(value.dtype).endswith("float64")
    np.testing.assert_allclose(f.numpy(value), want, rtol=1e-12)


@pytest.mark.slow
def test_second_derivatives_of_vid_in_jax():
    """kdtorch raises an error instead."""
    mean, t, a = RNG.normal(size=(2, 2, 2, 3)), RNG.normal(size=(2, 2, 2, 3)), RNG.normal(size=3)
    second = jax.jit(jax.hessian(lambda x: JAX.kd.vid_loss(x, jnp.asarray(t), jnp.asarray(a))))(jnp.asarray(mean))
    variance = np.log1p(np.exp(a)) + 1e-5
    np.testing.assert_allclose(np.diag(second.reshape(24, 24)).reshape(8, 3), np.tile(1 / variance / 24, (8, 1)))
