"""Classes spread over devices, with `class_axis_name` or by the compiler: results as on one device, communication."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spread import UNEVEN, divided, drawn
from tiers import only, slow

import kdjax
from parity.cases import KINDS, LOSSES, Sizes, draw
from parity.compare import ulps

pytestmark = pytest.mark.usefixtures("quick_compilation")

TAKE = [x for x in LOSSES if "class_axis_name" in inspect.signature(getattr(kdjax, x.name)).parameters]
OF_LOGITS = [x for x in TAKE if list(x.inputs.values()) == ["logits", "logits"]]
KL = next(x for x in TAKE if x.name == "kl_loss")
FORMS = [(loss, options) for loss in TAKE for options in loss.options]


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def layout(kind, data="data"):
    """The layout of an input: the batch over one axis of the mesh, and the classes over the other."""
    axes = {KINDS[kind].axis: data, divided(kind): "model"}
    return P(*(axes.get(i) for i in range(2) if any(k is not None and k >= i for k in axes)))


def given(loss, where=None, **sizes):
    (inputs,) = drawn(loss, where) if not sizes else draw(loss, Sizes(**sizes), 0)
    return {k: jnp.asarray(x, "int32" if x.dtype.kind == "i" else None) for k, x in inputs.items()}


def objective(loss, options, learned, fixed, temperature, where):
    inputs = {**learned, **fixed}
    cooled = {"temperature": temperature} if temperature is not None else {}
    return getattr(kdjax, loss.name)(*(inputs[k] for k in loss.inputs), where=where, **{**options, **cooled})


def split(loss, inputs):
    return {k: inputs[k] for k in loss.learns}, {k: x for k, x in inputs.items() if k not in loss.learns}


def sharded(loss, options, shape, vma=True, masked=False, inside=True, data="data"):
    """Value and gradients, also of the temperature, on a mesh of batch × classes, differentiated in or outside
    `shard_map`."""

    def mean(learned, fixed, temperature, where):
        names = {"axis_name": data, "class_axis_name": "model"}
        value = objective(loss, {**options, **names}, learned, fixed, temperature, where)
        return value if data is None else jax.lax.pmean(value, data)

    def slopes(function):
        return jax.value_and_grad(function, (0, 2))

    learned, fixed = ({k: layout(loss.inputs[k], data) for k in names} for names in split(loss, loss.inputs))
    specs = learned, fixed, P(), P("data") if masked else None
    over = functools.partial(jax.shard_map, mesh=mesh(*shape), in_specs=specs, check_vma=vma)
    if inside:
        return jax.jit(over(slopes(mean), out_specs=(P(), (learned, P()))))
    return jax.jit(slopes(over(mean, out_specs=P())))


@functools.cache
def alone(title, options, masked):
    loss, where = next(x for x in LOSSES if x.title == title), UNEVEN if masked else None
    step = jax.value_and_grad(functools.partial(objective, loss, dict(options)), (0, 2))
    return jax.jit(step)(*split(loss, given(loss, where)), jnp.asarray(2.0), where)


def agree(got, want):
    assert ulps(got[0], want[0], "float64") <= 64
    assert abs(want[1][1]) > 0
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert ulps(a, b, "float64") <= 256


@pytest.mark.parametrize("shape", [pytest.param((4, 2), id="4x2"), pytest.param((1, 8), id="1x8", marks=slow)])
@pytest.mark.parametrize(
    ("loss", "options"), only(lambda x: x == (KL, {}), FORMS), ids=lambda x: getattr(x, "title", "")
)
def test_inside_shard_map(loss, options, shape):
    """Value and all gradients, also of the temperature, with a mask that hides NaN."""
    inputs = split(loss, given(loss, UNEVEN))
    got = sharded(loss, options, shape, masked=True)(*inputs, jnp.asarray(2.0), jnp.asarray(UNEVEN))
    agree(got, alone(loss.title, tuple(options.items()), True))


@slow
@pytest.mark.parametrize("vma", [True, False])
@pytest.mark.parametrize("loss", TAKE, ids=lambda loss: loss.title)
def test_outside_of_shard_map(loss, vma):
    """The gradient of the whole loss, whether or not JAX tracks which arrays vary between devices."""
    got = sharded(loss, {}, (4, 2), vma, inside=False)(*split(loss, given(loss)), jnp.asarray(2.0), None)
    agree(got, alone(loss.title, (), False))


@slow
@pytest.mark.parametrize("shape", [(1, 8), (4, 2)], ids=["1x8", "4x2"])
@pytest.mark.parametrize("loss", TAKE, ids=lambda loss: loss.title)
def test_the_compilers_way(loss, shape):
    """With `jit` alone, and inputs sharded over the mesh."""
    devices = mesh(*shape)
    where = jax.device_put(jnp.asarray(UNEVEN), NamedSharding(devices, P("data")))
    inputs = {
        k: jax.device_put(x, NamedSharding(devices, layout(loss.inputs[k]))) for k, x in given(loss, UNEVEN).items()
    }
    step = jax.jit(jax.value_and_grad(functools.partial(objective, loss, {}), (0, 2)))
    agree(step(*split(loss, inputs), jnp.asarray(2.0), where), alone(loss.title, (), True))


def sent(function, *arguments):
    """The collectives of a compiled program: their names, and the numbers of entries of their results."""
    text = function.lower(*arguments).compile().as_text()
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (\S.*?) ({names})[\w-]*\(", text)
    return [
        (name, sum(int(np.prod([int(n) for n in x.split(",") if n])) for x in re.findall(r"\[([\d,]*)\]", shapes)))
        for shapes, name in found
    ]


@pytest.mark.parametrize("loss", only(lambda loss: loss is KL, TAKE), ids=lambda loss: loss.title)
def test_what_is_sent(loss):
    """Forward and backward, a few numbers per example, for any number of classes; and a gradient of hidden states."""
    totals = []
    for classes in (64, 512):
        inputs = given(loss, batch=(16,), classes=classes, kept=5)
        found = sent(sharded(loss, {}, (1, 8), data=None), *split(loss, inputs), jnp.asarray(2.0), None)
        assert {name for name, _ in found} == {"all-reduce"}
        totals.append(sum(entries for _, entries in found))
    hidden = sum(16 * Sizes().dim for k in loss.learns if loss.inputs[k] == "hidden")
    assert totals[0] == totals[1] <= 16 * 16 + hidden


@slow
@pytest.mark.parametrize("loss", [x for x in TAKE if "logits" in x.inputs.values()], ids=lambda loss: loss.title)
def test_what_the_compiler_sends(loss):
    """The same for logits that are sharded over a mesh; heads, which are sliced by classes, may be gathered."""
    devices, totals = mesh(1, 8), []
    for classes in (64, 512):
        inputs = given(loss, batch=(16,), classes=classes, kept=5)
        inputs = {k: jax.device_put(x, NamedSharding(devices, layout(loss.inputs[k]))) for k, x in inputs.items()}
        step = jax.jit(jax.value_and_grad(functools.partial(objective, loss, {}), (0, 2)))
        totals.append(sum(entries for _, entries in sent(step, *split(loss, inputs), jnp.asarray(2.0), None)))
    assert totals[0] == totals[1]


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loss", OF_LOGITS, ids=lambda loss: loss.title)
def test_laws(loss, dtype):
    """Equal rows, padded classes, large logits and half precision give the results of one device."""
    student, teacher = (np.array(x) for x in draw(loss, Sizes((8,), 16), 0)[0].values())
    student[0] = teacher[0]
    student[1] = 1e3 * student[1]
    student[2, 10:] = teacher[2, 10:] = -np.inf  # all classes of a device, and more
    student[3, 8:] = teacher[3, 8:] = -np.inf
    student[3, :8] = teacher[3, :8]
    teacher[4] = student[4] + 1e-3 * teacher[4]
    student[5] = 6e4 * np.sign(student[5])
    student, teacher = (jnp.asarray(x, dtype) for x in (student, teacher))
    function = getattr(kdjax, loss.name)

    def values(student, **options):
        return function(student, teacher, reduction="none", **options)

    def local(student, teacher):
        def total(student):
            each = function(student, teacher, reduction="none", class_axis_name="model")
            return 1000 * each.sum(), each

        return jax.grad(total, has_aux=True)(student)

    spec = P(None, "model")
    over = jax.shard_map(local, mesh=mesh(1, 8), in_specs=(spec, spec), out_specs=(spec, P()))
    gradient, each = jax.jit(over)(student, teacher)
    want = jax.jit(values)(student)
    slope = jax.jit(jax.grad(lambda x: 1000 * values(x).sum()))(student)
    assert gradient.dtype == dtype
    assert np.isfinite(each).all()
    assert (each[np.array([0, 3])] == 0).all()
    assert (gradient[np.array([0, 3])] == 0).all()
    assert (gradient[2, 10:] == 0).all()
    others = np.array([1, 2, 4, 5, 6, 7])  # without rows whose equal sums XLA on one device may round differently
    each, want, gradient, slope = (np.asarray(x, "float64")[others] for x in (each, want, gradient, slope))
    assert (np.abs(each - want) <= 64 * np.finfo(np.float32).eps * want).all()
    eps = 256 * np.finfo(np.float32).eps if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)
    assert (np.abs(gradient - slope) <= eps * np.abs(slope).max(-1, keepdims=True)).all()


@slow
@pytest.mark.parametrize("loss", OF_LOGITS, ids=lambda loss: loss.title)
def test_the_derivative_of_the_derivative(loss):
    student, teacher = given(loss, batch=(2,), classes=8).values()
    spec = P(None, "model")

    def whole(student, **options):
        return getattr(kdjax, loss.name)(student, teacher, **options)

    def local(student, teacher):
        return getattr(kdjax, loss.name)(student, teacher, class_axis_name="model")

    over = jax.shard_map(local, mesh=mesh(1, 8), in_specs=(spec, spec), out_specs=P())
    got, want = (jax.jit(jax.hessian(f))(student) for f in (lambda x: over(x, teacher), whole))
    assert ulps(got, want, "float64") <= 256


@pytest.mark.parametrize("loss", TAKE, ids=lambda loss: loss.title)
def test_an_unknown_axis(loss):
    inputs = given(loss)
    with pytest.raises(
        ValueError,
        match=r"^`class_axis_name` must be a mesh axis of the shard_map around the call, got 'vocabulary'; under jit",
    ):
        getattr(kdjax, loss.name)(*inputs.values(), class_axis_name="vocabulary")


@pytest.mark.parametrize("loss", TAKE, ids=lambda loss: loss.title)
def test_one_axis_for_both(loss):
    inputs = given(loss)
    with pytest.raises(
        ValueError, match=r"^`class_axis_name` must be another mesh axis than `axis_name`, got 'x' and .*'x'"
    ):
        getattr(kdjax, loss.name)(*inputs.values(), class_axis_name="x", axis_name=("y", "x"))


@pytest.mark.parametrize("name", ["dkd_loss", "difference_kl_loss", "tvd_loss", "skew_kl_loss"])
def test_a_loss_that_needs_all_classes(name):
    for option in ("class_axis_name", "class_group"):
        with pytest.raises(
            TypeError, match=rf"^{name}: got an unexpected keyword argument '{option}'; it needs all classes"
        ):
            getattr(kdjax, name)(jnp.ones((2, 3)), jnp.ones((2, 3)), **{option: "model"})


def test_the_name_of_the_other_package():
    with pytest.raises(
        TypeError, match=r"^kl_loss: got an unexpected keyword argument 'class_group'; write `class_axis_name`$"
    ):
        kdjax.kl_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), class_group="model")
    with pytest.raises(TypeError, match=r"^kl_loss: got an unexpected keyword argument 'group'; write `axis_name`$"):
        kdjax.kl_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), group="model")


@slow
def test_top_k_over_devices():
    """Indices refer to the whole vocabulary; one out of range, or one that occurs twice, makes its example NaN."""
    rng = np.random.default_rng(0)
    student, teacher = jnp.asarray(rng.normal(size=(2, 5, 16)))
    indices = jnp.asarray([[0, 1, 2], [15, 14, 3], [4, 16, 5], [7, 9, 7], [-1, 2, 3]], "int8")
    values = jnp.take_along_axis(teacher, jnp.clip(indices, 0, 15).astype("int32"), -1)
    rest = jnp.asarray(rng.normal(size=5))
    kept = jnp.asarray(indices >= 0)

    def local(student, values, indices, rest, kept, name):
        options = {"reduction": "none", "class_axis_name": name}
        return jnp.stack(
            [
                kdjax.topk_kl_loss(student, values, indices, rest, **options),
                kdjax.topk_kl_loss(student, values, indices, tail="renormalize", divergence="jsd", **options),
                kdjax.topk_kl_loss(student, values, indices, rest, kept=kept, divergence="reverse_kl", **options),
            ]
        )

    spec = P(None, "model")
    over = jax.shard_map(
        functools.partial(local, name="model"), mesh=mesh(1, 8), in_specs=(spec, P(), P(), P(), P()), out_specs=P()
    )
    arguments = student, values, indices, rest, kept
    got, want = jax.jit(over)(*arguments), jax.jit(functools.partial(local, name=None))(*arguments)
    assert np.isnan(got[:2, 2:]).all()
    assert np.isfinite(got[2, 4])
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_one_class_on_all_devices():
    with pytest.raises(ValueError, match=r"^the logits must have at least 2 classes on the last axis, got shape"):
        jax.shard_map(
            lambda x: kdjax.kl_loss(x, x, class_axis_name="model"),
            mesh=jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2),
            in_specs=P(),
            out_specs=P(),
        )(jnp.ones((2, 1)))


@slow
def test_a_combined_loss_hands_the_axis_on():
    rng = np.random.default_rng(0)
    feat = {k: jnp.asarray(rng.normal(size=(4, 8))) for k in ("stu", "tea", "score_stu", "score_tea")}
    target = jnp.arange(4)

    def combined(names, feat, **options):
        model = {"METRIC_LOSS_TYPE": f"kd-{names}", "KD_LOSS_WEIGHT": [1.0] * (1 + names.count("-")), "FEAT_DIM": 8}
        return kdjax.make_loss({"MODEL": model}, 8, 20)(feat=feat, target=target, **options)

    def local(names, feat):
        return combined(names, feat, class_axis_name="model")

    specs = {k: P(None, "model") if "score" in k else P() for k in feat}

    def over(names):
        step = functools.partial(local, names)
        return jax.jit(jax.shard_map(step, mesh=mesh(1, 8), in_specs=(specs,), out_specs=P()))(feat)

    assert float(over("kld-jsd-mse")) == pytest.approx(float(combined("kld-jsd-mse", feat)), rel=1e-12)
    with pytest.raises(
        ValueError, match=r"^the loss 'dkd' has no `class_axis_name`, because it needs all classes of an exam"
    ):
        over("kld-dkd")
