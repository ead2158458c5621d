"""DINO and iBOT with given targets, masked patches, KoLeo's neighbours, Gram's clipping, Sinkhorn-Knopp's edge
cases."""

import re

import jax
import numpy as np
import pytest
import torch
from frameworks import BOTH, JAX, TORCH
from tiers import first

from parity.arrays import HALVES
from parity.compare import ulps

both = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
RNG = np.random.default_rng(0)
B, P, D = 4, 5, 6
MASK = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]], bool)
KEPT = np.array([True, True, False, True])
VIEWS = {"student": RNG.normal(size=(4, B, D)), "teacher": RNG.normal(size=(2, B, D))}
PATCHES = {"student": RNG.normal(size=(B, P, D)), "teacher": RNG.normal(size=(B, P, D)), "mask": MASK}
CENTER = 0.1 * RNG.normal(size=D)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def stepped(f, name, inputs, dtype="float64", center=CENTER, **options):
    """Value, gradient and next state of `dino_loss` or `ibot_loss`, and the old state."""
    arrays, kd = f.arrays(inputs, dtype), f.kd
    state = (kd.DINOState if name == "dino_loss" else kd.IBOTState)(f.array(center))
    weights = f.array(np.arange(1.0, 1 + B))

    def value(student):
        loss, after = getattr(kd, name)(*{**arrays, "student": student}.values(), state, **options)
        return (loss * weights if loss.ndim else loss).sum(), (loss, after)

    slope, (loss, after) = f.jit(f.grad(value, has_aux=True))(arrays["student"])
    return f.numpy(loss), f.numpy(slope), after, state


@both
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "inputs"), [("dino_loss", VIEWS), ("ibot_loss", PATCHES)], ids=["dino", "ibot"])
def test_targets_that_are_the_teacher_s_own(f, name, inputs, masked):
    """Value and gradient are the same; the teacher is not used, and the old state is returned."""
    options = {"where": f.array(KEPT)} if masked else {}
    targets = softmax((inputs["teacher"] - CENTER) / 0.04)
    for reduction in ("mean", "sum", "none"):
        want, slope, moved, _ = stepped(f, name, inputs, reduction=reduction, **options)
        bad = {**inputs, "teacher": np.full_like(inputs["teacher"], np.nan)}
        given = {**options, "teacher_targets": f.array(targets), "reduction": reduction}
        got, got_slope, after, state = stepped(f, name, bad, **given)
        assert ulps(got, want, "float64") <= 64
        assert ulps(got_slope, slope, "float64") <= 256
        assert np.array_equal(f.numpy(after.center), f.numpy(state.center))
        assert not np.array_equal(f.numpy(moved.center), f.numpy(state.center))


@both
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("name", "inputs"), [("dino_loss", VIEWS), ("ibot_loss", PATCHES)], ids=["dino", "ibot"])
def test_targets_in_half_precision(f, name, inputs, dtype):
    targets = f.array(softmax(inputs["teacher"]), dtype)
    student = f.array(inputs["student"], dtype)
    wide = {**inputs, "student": f.numpy(student.astype("float32") if f is JAX else student.float())}
    arrays = f.arrays(inputs, dtype)
    state = (f.kd.DINOState if name == "dino_loss" else f.kd.IBOTState)(f.array(CENTER, "float32"))
    got, _ = getattr(f.kd, name)(*arrays.values(), state, teacher_targets=targets)
    assert str(got.dtype).endswith("float32")
    exact = f.array(f.numpy(targets.astype("float32") if f is JAX else targets.float()))
    want, *_ = stepped(f, name, wide, teacher_targets=exact)
    assert f.numpy(got) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
@pytest.mark.parametrize(("name", "inputs"), [("dino_loss", VIEWS), ("ibot_loss", PATCHES)], ids=["dino", "ibot"])
def test_targets_are_constant_and_checked(f, name, inputs):
    arrays = f.arrays(inputs)
    state = (f.kd.DINOState if name == "dino_loss" else f.kd.IBOTState)(f.array(CENTER))
    targets = f.array(softmax(inputs["teacher"]))

    def value(targets):
        return getattr(f.kd, name)(*arrays.values(), state, teacher_targets=targets)[0]

    if f is JAX:
        assert (jax.grad(value)(targets) == 0).all()
    with pytest.raises(TypeError, match=rf"^{name}: `teacher_targets` must be Float\["):
        value(targets[:1])
    with pytest.raises(TypeError, match=rf"^{name}: `teacher_targets` must be Float\["):
        value(targets[..., 1:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@pytest.mark.parametrize(("name", "inputs"), [("dino_loss", VIEWS), ("ibot_loss", PATCHES)], ids=["dino", "ibot"])
def test_targets_under_a_compiler(name, inputs):
    """A whole step: the assignments of the teacher's outputs, and the loss."""

    def step(student, teacher, *mask):
        where = mask[0].reshape(-1) if mask else None
        rows = teacher.reshape(-1, teacher.shape[-1])
        q = TORCH.kd.sinkhorn_knopp(rows, temperature=0.1, where=where).reshape(teacher.shape)
        state = (TORCH.kd.IBOTState if mask else TORCH.kd.DINOState)(torch.from_numpy(CENTER))
        return getattr(TORCH.kd, name)(student, teacher, *mask, state, teacher_targets=q)[0]

    student, *others = TORCH.arrays(inputs).values()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        given = student.clone().requires_grad_()
        value = function(given, *others)
        results.append((value.detach(), torch.autograd.grad(value, given)[0]))
    for got, want in zip(*results, strict=True):
        assert ulps(got.numpy(), want.numpy(), "float64") <= 256


@both
def test_patches_that_are_not_masked_may_hold_anything(f):
    bad = {k: np.where(MASK[..., None], x, np.nan) if k != "mask" else x for k, x in PATCHES.items()}
    want, slope, after, _ = stepped(f, "ibot_loss", PATCHES)
    got, got_slope, got_after, _ = stepped(f, "ibot_loss", bad)
    assert got == want
    assert np.array_equal(got_slope, slope)
    assert (got_slope[~MASK] == 0).all()
    assert np.array_equal(f.numpy(got_after.center), f.numpy(after.center))
    mean = PATCHES["teacher"][MASK].mean(0)
    assert ulps(f.numpy(after.center), 0.9 * CENTER + 0.1 * mean, "float64") <= 64


@both
def test_no_masked_patch(f):
    """Such an image has a loss of 0, but counts; a batch of them does not change the state; masked images do not
    count."""
    values, *_ = stepped(f, "ibot_loss", PATCHES, reduction="none")
    assert values[1] == 0
    assert (values[[0, 2, 3]] > 0).all()
    mean, *_ = stepped(f, "ibot_loss", PATCHES)
    assert mean == pytest.approx(values.sum() / B, rel=1e-14)
    for options, mask in (({}, MASK & False), ({"where": f.array(np.arange(B) == 1)}, MASK)):
        value, slope, after, state = stepped(f, "ibot_loss", {**PATCHES, "mask": mask}, **options)
        assert value == 0
        assert (slope == 0).all()
        assert np.array_equal(f.numpy(after.center), f.numpy(state.center))


@both
def test_one_image_of_one_patch(f):
    inputs = {k: x[:1, :1] for k, x in PATCHES.items()}
    arrays = f.arrays(inputs)
    value, state = f.kd.ibot_loss(*arrays.values(), f.kd.IBOTState(f.array(CENTER)))
    q = softmax((inputs["teacher"] - CENTER) / 0.04)
    want = -(q * np.log(softmax(inputs["student"] / 0.1))).sum()
    assert f.numpy(value) == pytest.approx(want, rel=1e-12)
    assert np.allclose(f.numpy(state.center), 0.9 * CENTER + 0.1 * inputs["teacher"][0, 0], rtol=1e-14)


def koleo(f, rows, dtype="float64", **options):
    """The value of each row, and the gradient of the sum."""

    def value(x):
        values = f.kd.koleo_loss(x, reduction="none", **options)
        return values.sum(), values

    slope, values = f.jit(f.grad(value, has_aux=True))(f.array(np.array(rows, float), dtype))
    return f.numpy(values), f.numpy(slope)


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_neighbours(f, dtype):
    """Opposite rows, equal ones, a zero row, and too few of them."""
    opposite, slope = koleo(f, [[3.0, 4.0, 0.0], [-3.0, -4.0, 0.0]], dtype)
    assert opposite == pytest.approx([-np.log(2)] * 2, rel=1e-6)
    assert np.abs(slope).max() < 1e-6
    equal, slope = koleo(f, [[1.0, 2.0, 2.0]] * 5, dtype)
    assert equal == pytest.approx([-np.log(1e-8 * (1 + 3**0.5))] * 5, rel=1e-5)
    assert np.isfinite(slope).all()
    values, slope = koleo(f, [[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], dtype)
    assert values == pytest.approx([0, 0, 0], abs=1e-6)  # the zero row is the nearest of both others
    assert (slope[0] == 0).all()
    for rows, where in (([[1.0, 2.0]], None), ([[1.0, 2.0], [3.0, 4.0], [np.nan, 1.0]], [False, True, False])):
        options = {} if where is None else {"where": f.array(np.array(where))}
        values, slope = koleo(f, rows, dtype, **options)
        assert (values == 0).all()
        assert (slope == 0).all()


@both
@pytest.mark.parametrize("number", [3, 8, 33])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_of_equal_neighbours_the_first(f, number, dtype):
    """Of copies of a row at the same distance from the last row, the first one gets the gradient."""
    rows = np.tile(RNG.normal(size=7), (number, 1))
    rows = np.concatenate([rows, rows[:1] + 0.5 * RNG.normal(size=(1, 7))])

    def value(x):
        return f.kd.koleo_loss(x, reduction="none")[-1]

    slope = f.numpy(f.jit(f.grad(value))(f.array(rows, dtype)))
    assert np.array_equal(np.abs(slope).max(1) > 0, np.isin(np.arange(number + 1), [0, number]))


@both
def test_near_neighbours_keep_their_digits(f):
    """In float32 the nearest row and its distance are found among rows that a matrix product cannot distinguish."""
    base = RNG.normal(size=(1, 16))
    rows = (base + 1e-5 * RNG.normal(size=(20, 16))).astype(np.float32).astype(float)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + np.diag(np.full(20, np.inf))
    values, _ = koleo(f, rows, "float32")
    assert np.abs(np.exp(-values) / distances.min(1) - 1).max() < 0.02  # unit rows are rounded by 1e-7 of 1e-5


@both
def test_clipped_products(f):
    """If both products are negative, they do not count; if only the student's is, it has no gradient."""
    student = np.array([[[1.0, 0.0], [-1.0, 0.5]], [[1.0, 0.0], [-1.0, 0.5]]])
    teacher = np.array([[[1.0, 0.0], [-1.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])

    def of(x, clip):
        value = f.kd.gram_loss(x, f.array(teacher), clip_negative=clip, reduction="none")
        return value.sum(), value

    for clip in ("none", "both", "teacher"):
        slope, value = f.grad(lambda x, clip=clip: of(x, clip), has_aux=True)(f.array(student))
        ours, theirs = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher))
        ours, theirs = ours @ ours.swapaxes(1, 2), theirs @ theirs.swapaxes(1, 2)
        ours = np.maximum(ours, 0) if clip == "both" else ours
        theirs = np.maximum(theirs, 0) if clip != "none" else theirs
        assert np.allclose(f.numpy(value), np.square(ours - theirs).mean((1, 2)), rtol=1e-12)
        if clip == "both":
            assert np.abs(f.numpy(slope)).max() < 1e-12


@both
@pytest.mark.parametrize("image_level", [True, False])
def test_a_zero_patch_and_products_of_raw_patches(f, image_level):
    student, teacher = PATCHES["student"].copy(), PATCHES["teacher"]
    student[0, 1] = 0

    def value(x, **options):
        return f.kd.gram_loss(x, f.array(teacher), image_level=image_level, **options)

    slope = f.numpy(f.grad(value)(f.array(student)))
    assert np.isfinite(slope).all()
    assert (slope[0, 1] == 0).all()
    raw = f.numpy(f.grad(lambda x: value(x, normalize=False))(f.array(student)))
    assert (raw[0, 1] != 0).any()  # its products with others differ from the teacher's, so it has a gradient


@both
def test_a_product_that_is_no_number_is_felt(f):
    for bad in ("student", "teacher"):
        inputs = {k: PATCHES[k].copy() for k in ("student", "teacher")}
        inputs[bad][2, 0, 0] = np.nan
        for clip in ("none", "both", "teacher"):
            value = f.kd.gram_loss(*f.arrays(inputs).values(), clip_negative=clip, reduction="none")
            assert np.array_equal(np.isnan(f.numpy(value)), np.arange(B) == 2)


@pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
def test_settings_that_do_not_exist(f):
    x, logits = f.array(PATCHES["student"]), f.array(VIEWS["teacher"][0])
    for call, text in (
        (lambda: f.kd.gram_loss(x, x, clip_negative="student"), "`clip_negative` must be"),
        (lambda: f.kd.sinkhorn_knopp(logits, temperature=0.1, iterations=0), "`iterations` must be at least 1, got 0"),
        (lambda: f.kd.sinkhorn_knopp(logits, temperature=0.0), "`temperature` must be finite and greater than 0"),
        (lambda: f.kd.sinkhorn_knopp(logits[:, :1], temperature=0.1), "at least 2 classes on the last axis"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(text)):
            call()


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_assignments(f, dtype):
    """Rows sum to 1 for logits of any size; prototypes are balanced after many steps; a prototype at -inf gets 0."""
    logits = RNG.normal(size=(12, 5))
    logits[:, 3] = -np.inf
    q = f.numpy(f.kd.sinkhorn_knopp(f.array(logits, dtype), temperature=0.5, iterations=200))
    assert (q[:, 3] == 0).all()
    assert np.allclose(q.sum(1), 1, rtol=1e-6)
    assert np.allclose(q.sum(0)[[0, 1, 2, 4]], 3, rtol=1e-5)
    for scale in (30.0, 1e4, 1e30):
        q = f.numpy(f.kd.sinkhorn_knopp(f.array(scale * logits, dtype), temperature=0.04))
        assert np.allclose(q.sum(1), 1, rtol=1e-6)


@both
def test_samples_that_take_no_part(f):
    """A masked sample is 0, whatever it holds; a sample that is all -inf becomes NaN, and no other does."""
    logits, where = RNG.normal(size=(6, 4)), np.arange(6) % 3 != 1
    bad = np.where(where[:, None], logits, np.nan)
    q = f.numpy(f.kd.sinkhorn_knopp(f.array(bad), temperature=0.3, where=f.array(where)))
    want = f.numpy(f.kd.sinkhorn_knopp(f.array(logits[where]), temperature=0.3))
    assert (q[~where] == 0).all()
    assert ulps(q[where], want, "float64") <= 64
    q = f.numpy(f.kd.sinkhorn_knopp(f.array(np.where(where[:, None], logits, -np.inf)), temperature=0.3))
    assert np.isnan(q[~where]).all()
    assert ulps(q[where], want, "float64") <= 64
    nothing = f.numpy(f.kd.sinkhorn_knopp(f.array(bad), temperature=0.3, where=f.array(where & False)))
    assert (nothing == 0).all()
