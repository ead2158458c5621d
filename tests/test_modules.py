"""The modules of both packages give the same numbers with the same weights."""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from frameworks import BOTH, JAX, TORCH, set_parameter
from tiers import first, slow
from torch.nn import functional

import kdjax.nn
import kdtorch.nn
from parity.compare import ulps

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(0)


def copy_weights(ours, theirs):
    """Copy the weights of a Flax module to its PyTorch counterpart, both in float64."""
    for path, value in nnx.to_flat_state(nnx.state(ours, nnx.Param)):
        value = np.asarray(value[...], np.float64)
        *names, last = (str(key) for key in path if key != "layers")
        module = theirs.get_submodule(".".join(names))
        if last == "kernel":
            value = value.T if value.ndim == 2 else np.transpose(value, (3, 2, 0, 1))
        set_parameter(getattr(module, {"kernel": "weight", "scale": "weight"}.get(last, last)), value)
    theirs.double()
    nnx.update(ours, jax.tree.map(lambda x: x.astype("float64"), nnx.state(ours, nnx.Param)))
    nnx.update(ours, jax.tree.map(lambda x: x.astype("float64"), nnx.state(ours, nnx.BatchStat)))


@pytest.mark.parametrize(
    "sizes", first(1, [[(7, 10), (5, 3), (2, 2)], [(8, 8), (4, 4), (2, 2)], [(6, 6), (6, 6), (3, 1)]])
)
def test_review_connectors(sizes):
    channels, wanted = (3, 4, 6), (5, 7, 8)
    ours = kdjax.nn.ReviewKD(channels, wanted, 6, rngs=nnx.Rngs(0))
    theirs = kdtorch.nn.ReviewKD(channels, wanted, 6)
    copy_weights(ours, theirs)
    maps = [RNG.normal(size=(2, c, *size)) for c, size in zip(channels, sizes, strict=True)]
    teacher = [RNG.normal(size=(2, c, *size)) for c, size in zip(wanted, sizes, strict=True)]

    def last(x):
        return jnp.asarray(np.moveaxis(x, 1, -1))

    def objective(module, maps):
        return JAX.kd.hcl_loss(module(maps), [last(x) for x in teacher])

    with jax.numpy_dtype_promotion("standard"):  # Flax's batch norm asks for a type of float64 and float32
        value, slopes = nnx.jit(nnx.value_and_grad(objective, argnums=1))(ours, [last(x) for x in maps])
    given = [torch.from_numpy(x).requires_grad_() for x in maps]
    outputs = theirs(given)
    assert [tuple(x.shape) for x in outputs] == [x.shape for x in teacher]
    got = TORCH.kd.hcl_loss(outputs, [torch.from_numpy(x) for x in teacher])
    got.backward()
    assert ulps(got.detach().numpy(), np.asarray(value), "float64") <= 256
    for a, b in zip(given, slopes, strict=True):
        assert ulps(a.grad.numpy(), np.moveaxis(np.asarray(b), -1, 1), "float64") <= 2**16


# heights and widths of the student's maps and of the teacher's, from the first to the deepest
RESIZED = {
    "224 pixels against 256": ([28, 14, 7], [32, 16, 8]),
    "halving": ([32, 16, 8], [16, 8, 4]),
    "doubling": ([16, 8, 4], [32, 16, 8]),
    "pooled at the end": ([16, 8, 1], [32, 16, 1]),
    "as they are": ([16, 8, 4], [16, 8, 4]),
    "some of them": ([16, 8, 4], [16, 4, 5]),
    "no squares": ([(12, 7), (6, 5), (3, 2)], [(5, 9), (8, 3), (2, 2)]),
}


def released(review, maps, sizes, training):
    """The released connectors, written from the paper, starting at the deepest map, with PyTorch's own interpolation.

    A deeper map is resized to the student's size to be fused, and all maps to the teacher's size before the last
    convolution.
    """

    def norm(layer, x):
        return functional.batch_norm(
            x, layer.running_mean.clone(), layer.running_var.clone(), layer.weight, layer.bias, training, 0.1, 1e-5
        )

    outputs, before = [], None
    for connector, x, size in reversed(list(zip(review.connectors, maps, sizes, strict=True))):
        x = norm(connector.norm1, functional.conv2d(x, connector.conv1.weight))
        if before is not None:
            y = functional.interpolate(before, tuple(x.shape[2:]), mode="nearest")
            z = functional.conv2d(torch.cat([x, y], 1), connector.attention.weight, connector.attention.bias).sigmoid()
            x = x * z[:, 0][:, None] + y * z[:, 1][:, None]
        before = functional.interpolate(x, size, mode="nearest")
        outputs.append(norm(connector.norm2, functional.conv2d(before, connector.conv2.weight, padding=1)))
    return outputs[::-1]


@slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("setting", first(1, RESIZED))
def test_connectors_resize_as_released(setting, training):
    channels, wanted = (3, 4, 6), (5, 7, 8)
    sizes, shapes = RESIZED[setting]
    ours = kdjax.nn.ReviewKD(channels, wanted, 6, out_shapes=shapes, rngs=nnx.Rngs(0))
    theirs = kdtorch.nn.ReviewKD(channels, wanted, 6, out_shapes=shapes)
    copy_weights(ours, theirs)
    for module in (ours, theirs):
        module.train() if training else module.eval()
    sizes, shapes = ([(x, x) if isinstance(x, int) else x for x in given] for given in (sizes, shapes))
    maps = [RNG.normal(size=(2, c, *size)) for c, size in zip(channels, sizes, strict=True)]
    above = [RNG.normal(size=(2, c, *size)) for c, size in zip(wanted, shapes, strict=True)]

    def with_slopes(review):
        given = [torch.from_numpy(x).requires_grad_() for x in maps]
        outputs = review(given)
        torch.autograd.backward(outputs, [torch.from_numpy(x) for x in above])
        return [x.detach().numpy() for x in outputs], [x.grad.numpy() for x in given]

    want, want_slopes = with_slopes(lambda given: released(theirs, given, shapes, training))
    got, slopes = with_slopes(theirs)

    def objective(module, maps):
        outputs = module(maps)
        return sum((x * last(y)).sum() for x, y in zip(outputs, above, strict=True)), outputs

    def last(x):
        return jnp.asarray(np.moveaxis(x, 1, -1))

    def first(x):
        return np.moveaxis(np.asarray(x), -1, 1)

    with jax.numpy_dtype_promotion("standard"):  # Flax's batch norm asks for a type of float64 and float32
        step = nnx.jit(nnx.grad(objective, argnums=1, has_aux=True))
        jax_slopes, outputs = step(ours, [last(x) for x in maps])
    got += [first(x) for x in outputs]
    slopes += [first(x) for x in jax_slopes]
    for a, b in zip([*got, *slopes], [*want, *want, *want_slopes, *want_slopes], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    for i, connector in enumerate(theirs.connectors):  # running averages, which training updates equally
        for name in ("norm1", "norm2"):
            norm, other = getattr(connector, name), getattr(ours.connectors[i], name)
            np.testing.assert_allclose(norm.running_mean.numpy(), other.mean[...], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(norm.running_var.numpy(), other.var[...], rtol=1e-9)
            assert bool((norm.running_mean != 0).any()) == training


def test_nearest_neighbours_are_pytorchs():
    """For common sizes of maps; at a few others, such as 14 to 46, PyTorch's result depends on the rounding of the
    ratio."""
    for size, wanted in itertools.product(
        (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64), repeat=2
    ):
        x = np.arange(float(size), dtype="float32").reshape(1, 1, size, 1)
        want = functional.interpolate(torch.from_numpy(x), (wanted, 3), mode="nearest").numpy()
        assert np.array_equal(kdtorch.nn.reviewkd._resize(torch.from_numpy(x), wanted, 3).numpy(), want)
        if size % 7 == 0 and wanted % 8 == 0:  # only some, because each is compiled
            got = kdjax.nn.reviewkd._resize(np.moveaxis(x, 1, -1), wanted, 3)
            assert np.array_equal(np.moveaxis(np.asarray(got), -1, 1), want)


@pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([8], r"`out_shapes` must have one size per map, 2 in all, got \[8\]"),
        (8, "`out_shapes` must have one size per map, 2 in all, got 8"),
        ([8, 0], r"`out_shapes\[1\]` must be a whole number of at least 1, or height and width, got 0"),
        ([8, (4, 4, 4)], r"`out_shapes\[1\]` must be .* got \(4, 4, 4\)"),
        (["8", 4], r"`out_shapes\[0\]` must be .* got '8'"),
    ],
)
def test_wrong_sizes(f, given, message):
    module, rngs = (kdjax.nn, {"rngs": nnx.Rngs(0)}) if f is JAX else (kdtorch.nn, {})
    with pytest.raises(ValueError, match=message):
        module.ReviewKD([3, 4], [5, 6], 4, out_shapes=given, **rngs)
    with pytest.raises(ValueError, match="`out_shapes` must be a whole number of at least 1, or height and width"):
        module.ABF(3, 4, 5, False, out_shapes=2.5, **rngs)


def last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def test_vid():
    """The value and all gradients with a mask, for the same weights."""
    ours, theirs = kdjax.nn.VIDLoss(3, 6, 4, rngs=nnx.Rngs(0)), kdtorch.nn.VIDLoss(3, 6, 4)
    assert ours.log_scale[...] == pytest.approx(np.log(np.expm1(5 - 1e-5)))
    copy_weights(ours, theirs)
    student, teacher = RNG.normal(size=(5, 3, 4, 5)), RNG.normal(size=(5, 4, 4, 5))
    where = np.array([True, True, False, True, False])

    def objective(module, x):
        return module(x, last(teacher), where=where)

    value, (of_module, of_map) = nnx.jit(nnx.value_and_grad(objective, argnums=(0, 1)))(ours, last(student))
    x = torch.from_numpy(student).requires_grad_()
    got = theirs(x, torch.from_numpy(teacher), where=torch.from_numpy(where))
    got.backward()
    assert ulps(got.detach().numpy(), np.asarray(value), "float64") <= 64
    assert ulps(x.grad.numpy(), np.moveaxis(np.asarray(of_map), -1, 1), "float64") <= 256
    slopes = {tuple(k for k in path if k != "layers"): v[...] for path, v in nnx.to_flat_state(of_module)}
    assert ulps(theirs.log_scale.grad.numpy(), np.asarray(slopes["log_scale",]), "float64") <= 256
    for i in (0, 2, 4):
        kernel = np.asarray(slopes["regressor", i, "kernel"])[0, 0].T
        assert ulps(theirs.regressor[i].weight.grad.numpy()[..., 0, 0], kernel, "float64") <= 4096


@pytest.mark.parametrize(("batch_norm", "training"), [(False, True), (True, True), (True, False)])
def test_projector(batch_norm, training):
    """It applies a 1×1 convolution to maps and a linear layer to features, with the same weights in both packages."""
    ours = kdjax.nn.Projector(3, 4, batch_norm=batch_norm, rngs=nnx.Rngs(0))
    theirs = kdtorch.nn.Projector(3, 4, batch_norm=batch_norm)
    copy_weights(ours, theirs)
    for module in (ours, theirs):
        module.train() if training else module.eval()
    weight, bias = theirs.linear.weight, theirs.linear.bias
    maps, tokens, rows = RNG.normal(size=(2, 3, 4, 5)), RNG.normal(size=(2, 6, 3)), RNG.normal(size=(7, 3))
    step = nnx.jit(lambda module, x: module(x))
    with jax.numpy_dtype_promotion("standard"):  # Flax's batch norm asks for a type of float64 and float32
        got = [np.moveaxis(np.asarray(step(ours, last(maps))), -1, 1)]
        got += [np.asarray(step(ours, jnp.asarray(x))) for x in (tokens, rows)]
    outputs = [theirs(torch.from_numpy(x)) for x in (maps, tokens, rows)]
    plain = [functional.conv2d(torch.from_numpy(maps), weight[..., None, None], bias)]
    plain += [functional.linear(torch.from_numpy(x), weight, bias) for x in (tokens, rows)]
    for i, (a, b, c) in enumerate(zip(got, outputs, plain, strict=True)):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-9, atol=1e-11)
        if batch_norm and training:
            norm = torch.nn.BatchNorm2d(4).double()
            flat = c if i == 0 else c.movedim(-1, 1) if c.ndim == 3 else c
            c = norm(flat.reshape(*flat.shape[:2], -1, 1)).reshape(flat.shape)
            c = c.movedim(1, -1) if i == 1 else c
        elif batch_norm:
            c = c / np.sqrt(1 + 1e-5)
        np.testing.assert_allclose(b.detach().numpy(), c.detach().numpy(), rtol=1e-9, atol=1e-11)
    if batch_norm:
        np.testing.assert_allclose(theirs.norm.running_var.numpy(), ours.norm.var[...], rtol=1e-9)
        assert bool((theirs.norm.running_mean != 0).any()) == training


MASKED = {  # the arguments; the first one goes through a head
    "VIDLoss": ((3, 6, 4), [RNG.normal(size=(4, 3, 2, 2)), RNG.normal(size=(4, 4, 2, 2))]),
    "USKDLoss": ((5, 6), [RNG.normal(size=(4, 5)), RNG.normal(size=(4, 6)), np.arange(4)]),
    "CRCDLoss": ((5, 6, 4, 9), [RNG.normal(size=(4, 5)), RNG.normal(size=(4, 6)), np.arange(4), np.ones((4, 3), int)]),
}


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
@pytest.mark.parametrize("name", MASKED)
def test_masked_examples_before_a_head_may_hold_nan(f, name):
    """Their NaN does not reach any weight, although 0 times NaN is NaN."""
    sizes, inputs = MASKED[name]
    where = np.array([True, False, True, True])
    spoilt = [np.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan) if x.dtype == float else x for x in inputs]
    slopes = []
    for given in (inputs, spoilt):
        if f is TORCH:
            torch.manual_seed(0)
            module = kdtorch.nn.__dict__[name](*sizes)
            arrays = [torch.from_numpy(x).float() if x.dtype == float else torch.from_numpy(x) for x in given]
            module(*arrays, where=torch.from_numpy(where)).backward()
            slopes.append([x.grad.numpy() for x in module.parameters() if x.grad is not None])
        else:
            module = kdjax.nn.__dict__[name](*sizes, rngs=nnx.Rngs(0))
            arrays = [last(x) if x.ndim == 4 else jnp.asarray(x) for x in given]
            arrays = [x.astype("float32") if x.dtype == float else x for x in arrays]
            step = nnx.jit(nnx.grad(lambda module, *arrays: module(*arrays, where=where)))
            slopes.append(list(map(np.asarray, jax.tree.leaves(step(module, *arrays)))))
    assert len(slopes[0]) > 0
    for a, b in zip(*slopes, strict=True):
        assert np.array_equal(a, b)


@slow
@pytest.mark.parametrize(
    ("name", "embed"),
    [
        ("CRCDLoss", "linear"),
        ("CRCDLoss", "nonlinear"),
        ("CRCDLoss", "none"),
        ("CRDLoss", "linear"),
        ("CRDLoss", "none"),
    ],
)
def test_contrast_with_memories(name, embed):
    """Three steps with the same weights, memories and negatives."""
    dims = (4, 4, 4) if embed == "none" else (5, 6, 4)
    ours = getattr(kdjax.nn, name)(*dims, 20, num_negatives=7, embed=embed, rngs=nnx.Rngs(0))
    theirs = getattr(kdtorch.nn, name)(*dims, 20, num_negatives=7, embed=embed)
    copy_weights(ours, theirs)
    for field in kdjax.CRCDState._fields:
        value = np.asarray(getattr(ours, field)[...], np.float64)
        setattr(ours, field, kdjax.nn.LossState(jnp.asarray(value)))
        setattr(theirs, field, torch.from_numpy(value.copy()))
    step = nnx.jit(lambda module, *batch: module(*batch))
    for _ in range(3):
        student, teacher = RNG.normal(size=(6, dims[0])), RNG.normal(size=(6, dims[1]))
        index, negatives = RNG.choice(20, 6, replace=False), RNG.integers(20, size=(6, 7))
        want = step(ours, *(JAX.array(x) for x in (student, teacher, index, negatives)))
        got = theirs(*(TORCH.array(x) for x in (student, teacher, index, negatives)))
        assert ulps(got.detach().numpy(), np.asarray(want), "float64") <= 4096
    for field in kdjax.CRCDState._fields:
        assert ulps(getattr(theirs, field).numpy(), np.asarray(getattr(ours, field)[...]), "float64") <= 4096


@pytest.mark.parametrize("name", ["CRCDLoss", "CRDLoss"])
def test_contrast_stops_at_the_teachers_features(name):
    ours = getattr(kdjax.nn, name)(5, 6, 4, 20, num_negatives=7, rngs=nnx.Rngs(0))
    student, index = jnp.ones((3, 5), "float32"), jnp.arange(3)
    teacher = jax.random.normal(jax.random.key(0), (3, 6), "float32")
    ours.eval()
    assert not np.any(jax.jit(jax.grad(lambda t: ours(student, t, index)))(teacher))
    heads = nnx.jit(nnx.grad(lambda module: module(student, teacher, index)))(ours)
    assert np.any(np.asarray(heads["teacher_head"]["kernel"][...]) != 0)

    theirs = getattr(kdtorch.nn, name)(5, 6, 4, 20, num_negatives=7)
    features = torch.from_numpy(np.array(teacher)).requires_grad_()
    theirs(torch.ones(3, 5), features, torch.arange(3)).backward()
    assert features.grad is None
    assert theirs.teacher_head.weight.grad.any()


@slow
@pytest.mark.parametrize("name", ["CRCDLoss", "CRDLoss"])
def test_negatives_are_drawn_anew(name):
    ours = getattr(kdjax.nn, name)(4, 4, 4, 50, num_negatives=5, rngs=nnx.Rngs(0))
    x, index = jax.random.normal(jax.random.key(0), (3, 4), "float32"), jnp.arange(3)
    before = copy.deepcopy(jax.random.key_data(ours.key[...]))
    ours(x, x, index)
    assert not np.array_equal(before, jax.random.key_data(ours.key[...]))


@slow
def test_a_state_of_numpy():
    """A state may consist of NumPy arrays, like all other arrays of kdjax."""
    memories = [np.eye(4, 3), np.ones((4, 3)), np.zeros(()), np.zeros(())]
    index, negatives = np.arange(2), np.array([[2], [3]])
    value, after = JAX.kd.crcd_loss(np.eye(2, 3), np.ones((2, 3)), index, negatives, JAX.kd.CRCDState(*memories))
    assert value > 0
    assert after.student_normalizer > 0


@pytest.mark.parametrize("name", ["CRCDLoss", "CRDLoss"])
def test_an_empty_batch_of_contrast(name):
    ours = getattr(kdjax.nn, name)(5, 6, 4, 20, num_negatives=7, rngs=nnx.Rngs(0))
    assert ours(jnp.zeros((0, 5), "float32"), jnp.zeros((0, 6), "float32"), jnp.zeros(0, int)) == 0
    theirs = getattr(kdtorch.nn, name)(5, 6, 4, 20, num_negatives=7)
    assert theirs(torch.zeros(0, 5), torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)) == 0


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_negatives_of_a_batch_of_any_size():
    torch._dynamo.reset()
    draw = torch.compile(
        lambda x: TORCH.kd.crcd_negatives(None, len(x), 3, 5), fullgraph=True, dynamic=True, backend="eager"
    )
    assert draw(torch.zeros(4)).shape == (4, 3)


def test_heads_have_a_precision_of_their_own():
    """A head in half precision or float64 accepts features of any precision."""
    x, labels = torch.from_numpy(RNG.normal(size=(4, 8))), torch.arange(4)
    for head in (torch.bfloat16, torch.float32, torch.float64):
        uskd, crcd = kdtorch.nn.USKDLoss(8, 8), kdtorch.nn.CRCDLoss(8, 8, 4, 20, num_negatives=7, embed="nonlinear")
        crd = kdtorch.nn.CRDLoss(8, 8, 4, 20, num_negatives=7)
        for part in (uskd.head, crcd.student_head, crcd.teacher_head, crd.student_head, crd.teacher_head):
            part.to(head)
        for features in (torch.bfloat16, torch.float64):
            y = x.to(features)
            for value in (uskd(y, y, labels), crcd(y, y, labels), crd(y, y, labels)):
                value.backward()
                assert torch.isfinite(value)


@slow
def test_half_precision_features():
    for module, array in (
        (kdjax.nn.USKDLoss(8, 10, rngs=nnx.Rngs(0)), lambda x: jnp.asarray(x, "bfloat16")),
        (kdtorch.nn.USKDLoss(8, 10), lambda x: torch.from_numpy(x).bfloat16()),
    ):
        labels = jnp.array([1, 2]) if isinstance(module, nnx.Module) else torch.tensor([1, 2])
        loss = module(array(RNG.normal(size=(2, 8))), array(RNG.normal(size=(2, 10))), labels)
        assert str(loss.dtype).endswith("float32")
