"""Several devices give the results of one: all losses of the table, sharded by the compiler and inside `shard_map`."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spread import SIZES, UNEVEN, drawn
from tiers import REPRESENTATIVES, first, one_of_a_kind, only, slow

import kdjax
from parity.calls import per_example
from parity.cases import KINDS, LOSSES, MAPS, Sizes, draw, each_array
from parity.compare import ulps

LAYOUTS = {kind: P(*[None] * k.axis, "batch") if k.axis is not None else P() for kind, k in KINDS.items()}

pytestmark = pytest.mark.usefixtures("quick_compilation")
every = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)


def mesh(*shape):
    return jax.make_mesh(shape, ("batch", "classes")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def given(loss, where=None):
    """The inputs of each step in JAX, with NaN in masked examples, and the state."""
    maps = {k for k, kind in loss.inputs.items() if kind in MAPS}

    def array(x):
        return jnp.asarray(x, "int32" if x.dtype.kind == "i" else None)

    steps = [
        {k: each_array(v, lambda x, k=k: array(np.moveaxis(x, 1, -1) if k in maps else x)) for k, v in inputs.items()}
        for inputs in drawn(loss, where)
    ]
    fields = steps[0].pop(loss.state, None)
    return steps, fields and getattr(kdjax, loss.inputs[loss.state])(**fields)


def objective(loss, options, learned, fixed, state, where):
    """The loss, and the next state."""
    inputs = {**learned, **fixed, **({loss.state: state} if loss.state else {})}
    value = per_example(kdjax, loss)(*(inputs[k] for k in loss.inputs), where=where, **options)
    return value if loss.state else (value, None)


def split(loss, inputs):
    learned = {k: inputs[k] for k in loss.learns}
    return learned, {k: v for k, v in inputs.items() if k not in learned}


def remembers_rows(loss):
    """Whether the state of a loss has a row for each sample, so that it may be divided among devices."""
    return "sharded_memory" in inspect.signature(getattr(kdjax, loss.name)).parameters


def layouts(loss, names):
    return {k: LAYOUTS[loss.inputs[k]] for k in names}


@functools.cache
def alone(title, masked):
    """The values, gradients and states of the steps on one device."""
    loss, where = next(x for x in LOSSES if x.title == title), UNEVEN if masked else None
    steps, state = given(loss, where)
    step = jax.jit(jax.value_and_grad(functools.partial(objective, loss, {}), has_aux=True))
    results = []
    for inputs in steps:
        (value, state), gradients = step(*split(loss, inputs), state, where)
        results.append((value, gradients, state))
    return results


def agree(got, want, limit=(64, 256, 64)):
    for (value, gradients, state), (value_, gradients_, state_) in zip(got, want, strict=True):
        assert ulps(value, value_, "float64") <= limit[0]
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_), strict=True):
            assert ulps(a, b, "float64") <= limit[1]
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_), strict=True):
            assert ulps(a, b, "float64") <= limit[2]


@pytest.mark.parametrize("loss", one_of_a_kind(LOSSES), ids=lambda loss: loss.title)
@pytest.mark.parametrize(("vma", "where"), first(1, [(True, UNEVEN), (False, None)]), ids=["uneven", "all"])
def test_inside_shard_map(loss, vma, where):
    """The mean over devices is the loss of the whole batch, also for gradients; the states are equal bit by bit."""
    devices = mesh(8)
    steps, state = given(loss, where)
    learned, fixed = split(loss, steps[0])

    def local(learned, fixed, state, where):
        def mean(learned):
            value, after = objective(loss, {"axis_name": "batch"}, learned, fixed, state, where)
            return jax.lax.pmean(value, "batch"), after

        (value, state), gradients = jax.value_and_grad(mean, has_aux=True)(learned)
        if not vma:  # then the sum over devices is differentiated
            gradients = {
                k: jax.tree.map(lambda x: x / 8, g)
                if KINDS[loss.inputs[k]].axis is not None
                else jax.lax.pmean(g, "batch")
                for k, g in gradients.items()
            }
        every_state = jax.tree.map(lambda x: jax.lax.pcast(x, "batch", to="varying")[None] if vma else x[None], state)
        return value, gradients, state, every_state

    specs = (layouts(loss, learned), layouts(loss, fixed), P(), None if where is None else P("batch"))
    step = jax.jit(
        jax.shard_map(local, mesh=devices, in_specs=specs, out_specs=(P(), specs[0], P(), P("batch")), check_vma=vma)
    )
    results = []
    for inputs in steps:
        value, gradients, state, every_state = step(*split(loss, inputs), state, where)
        for x in jax.tree.leaves(every_state):
            x = np.asarray(x)
            assert (x == x[:1]).all()
        results.append((value, gradients, state))
    agree(results, alone(loss.title, where is not None))


def placed(loss, devices, inputs):
    """The inputs sharded over a mesh; logits over both of its axes."""

    def layout(name, x):
        if loss.inputs[name] == "logits" and "classes" in devices.axis_names:
            return P("batch", "classes")
        return LAYOUTS[loss.inputs[name]]

    return {
        k: jax.tree.map(lambda x, k=k: jax.device_put(x, NamedSharding(devices, layout(k, x))), v)
        for k, v in inputs.items()
    }


@pytest.mark.slow
@every
@pytest.mark.parametrize(("shape", "where"), [((1,), None), ((8,), UNEVEN), ((4, 2), None)], ids=["1", "8", "4x2"])
def test_the_compilers_way(loss, shape, where):
    """With `jit` alone, and inputs and memories sharded over a mesh."""
    devices = mesh(*shape)
    steps, state = given(loss, where)
    if loss.state:
        layout = NamedSharding(devices, P("batch") if remembers_rows(loss) else P())
        state = jax.tree.map(lambda x: jax.device_put(x, layout if x.ndim else NamedSharding(devices, P())), state)
    if where is not None:
        where = jax.device_put(jnp.asarray(where), NamedSharding(devices, P("batch")))
    step = jax.jit(jax.value_and_grad(functools.partial(objective, loss, {}), has_aux=True))
    results = []
    for inputs in steps:
        (value, state), gradients = step(*split(loss, placed(loss, devices, inputs)), state, where)
        results.append((value, gradients, state))
    agree(results, alone(loss.title, where is not None))


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [x for x in LOSSES if "logits" in x.inputs.values() and x.leading and not x.batch_coupled],
    ids=lambda x: x.title,
)
def test_a_vocabulary_in_shards(loss):
    """Masked tokens, `[batch, tokens, vocabulary]`, with batch and vocabulary sharded over different axes of the
    mesh."""
    devices = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    (inputs,) = draw(loss, Sizes(batch=(4, 3), classes=8), 0)
    inputs = {k: jnp.asarray(x, "int32" if x.dtype.kind == "i" else None) for k, x in inputs.items()}
    where = jnp.arange(12).reshape(4, 3) % 5 != 1
    step = jax.jit(jax.value_and_grad(functools.partial(objective, loss, {}), has_aux=True))
    results = []
    for spread in (False, True):
        given = dict(inputs)
        for k, x in inputs.items() if spread else ():
            layout = P("data", None, "model") if loss.inputs[k] == "logits" else P("data")
            given[k] = jax.device_put(x, NamedSharding(devices, layout))
        (value, state), gradients = step(*split(loss, given), None, where)
        results.append((value, gradients, state))
    agree(results[1:], results[:1])


def inside(loss, where, vma=False, **options):
    """A compiled step of all devices and its arguments; it returns value, gradients and state of each device."""
    steps, state = given(loss, where)
    learned, fixed = split(loss, steps[0])

    def local(learned, fixed, state, where):
        step = functools.partial(objective, loss, {"axis_name": "batch", **options})
        (value, state), gradients = jax.value_and_grad(step, has_aux=True)(learned, fixed, state, where)
        return value[None], gradients, jax.tree.map(lambda x: x[None], state)

    in_specs = (layouts(loss, learned), layouts(loss, fixed), P(), None if where is None else P("batch"))
    if options.get("sharded_memory"):
        in_specs = (*in_specs[:2], jax.tree.map(lambda x: P("batch") if x.ndim else P(), state), in_specs[3])
    function = jax.shard_map(
        local, mesh=mesh(8), in_specs=in_specs, out_specs=(P("batch"), in_specs[0], P("batch")), check_vma=vma
    )
    return jax.jit(function), (learned, fixed, state, where)


@pytest.mark.parametrize(
    ("loss", "where"),
    only(
        lambda x: x[0].name in REPRESENTATIVES and x[1] is None,
        [(x, None) for x in LOSSES]
        + [(x, UNEVEN) for x in LOSSES if x.name in ("kl_loss", "dino_loss", "difference_kl_loss")],
    ),
    ids=lambda x: getattr(x, "title", "all" if x is None else "uneven"),
)
def test_collectives(loss, where):
    """Losses of single examples communicate nothing; others never more than `[batch, dim]`, and never pairs."""
    step, arguments = inside(loss, where)
    text = step.lower(*arguments).compile().as_text()
    found = re.findall(r"= (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\w*\(", text)
    names = sorted(name for _, name in found)
    if where is None:
        assert names == sorted(loss.collectives)
    else:  # a masked mean also sums the number of kept examples
        assert len(names) <= len(loss.collectives) + 2
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in re.findall(r"\[([\d,]*)\]", str(found))]
    assert max(sizes, default=0) <= 16 * 8


COOLED = [
    (loss, name)
    for loss in LOSSES
    for name in ("temperature", "student_temperature")
    if loss.learns and name in loss.ranges
]


@pytest.mark.parametrize(("loss", "name"), first(1, COOLED), ids=lambda x: getattr(x, "title", ""))
def test_the_gradient_of_a_temperature(loss, name):
    """It is the gradient for the whole batch."""
    (inputs, *_), state = given(loss, UNEVEN)

    def mean(temperature, inputs, state, where, **options):
        value, _ = objective(loss, {name: temperature, **options}, inputs, {}, state, where)
        return jax.lax.pmean(value, "batch") if options else value

    local = jax.grad(functools.partial(mean, axis_name="batch"))
    specs = (P(), layouts(loss, inputs), P(), P("batch"))
    step = jax.jit(jax.shard_map(local, mesh=mesh(8), in_specs=specs, out_specs=P()))
    at = jnp.asarray(np.mean(loss.ranges[name]))
    got, want = step(at, inputs, state, UNEVEN), jax.jit(jax.grad(mean))(at, inputs, state, UNEVEN)
    assert want != 0
    assert ulps(got, want, "float64") <= 256


with_state = pytest.mark.parametrize("loss", one_of_a_kind(x for x in LOSSES if x.state), ids=lambda loss: loss.title)


@slow
@pytest.mark.parametrize("loss", list(filter(remembers_rows, LOSSES)), ids=lambda loss: loss.title)
@pytest.mark.parametrize("places", ["uniform", "all of one device"])
def test_memories_in_shards(loss, places):
    """Each device holds its rows of the memories; only the rows of the batch are communicated."""
    step, arguments = inside(loss, UNEVEN, sharded_memory=True)
    alike, replicated = inside(loss, UNEVEN)
    for function, (learned, fixed, state, where) in ((step, arguments), (alike, replicated)):
        if places != "uniform":
            fixed["negatives"] %= 4
        function(learned, fixed, state, where)
    (value, gradients, state), (value_, gradients_, state_) = step(*arguments), alike(*replicated)
    assert ulps(value.mean(), value_.mean(), "float64") <= 64
    for k in gradients:
        assert ulps(gradients[k], gradients_[k], "float64") <= 256
    for field in ("student_memory", "teacher_memory"):
        rows, whole = getattr(state, field), getattr(state_, field)[0]
        assert rows.shape == (8, SIZES.num_data // 8, SIZES.dim)
        assert ulps(rows.reshape(whole.shape), whole, "float64") <= 64
    text = step.lower(*arguments).compile().as_text()
    assert "all-to-all" in text
    assert not re.search(rf"\[{SIZES.num_data},{SIZES.dim}\]\S* all-gather", text)


@with_state
def test_no_update(loss):
    """With `update=False`, for micro-batches, the loss is the same and the state is returned unchanged."""
    (inputs, *_), state = given(loss)
    value, after = objective(loss, {}, inputs, {}, state, None)
    again, same = objective(loss, {"update": False}, inputs, {}, state, None)
    assert again == value
    assert same is state
    assert any((a != b).any() for a, b in zip(after, state, strict=True))


@with_state
def test_one_device_with_nan(loss):
    """The loss of the batch is NaN; the states stay finite, and equal on all devices."""
    step, (learned, fixed, state, where) = inside(loss, None)
    name = loss.constant[0] if loss.constant else loss.first
    bad = fixed if name in fixed else learned
    bad[name] = bad[name].at[..., -1, :].set(jnp.nan)
    value, _, after = step(learned, fixed, state, where)
    assert np.isnan(value.mean())
    for x in map(np.asarray, jax.tree.leaves(after)):
        assert np.isfinite(x).all()
        assert (x == x[:1]).all()


@pytest.mark.parametrize("loss", one_of_a_kind(LOSSES), ids=lambda loss: loss.title)
def test_unknown_axis(loss):
    (inputs, *_), state = given(loss)
    with pytest.raises(
        ValueError, match="`axis_name` must be a mesh axis of the shard_map around the call, got 'data'"
    ):
        objective(loss, {"axis_name": "data"}, inputs, {}, state, None)


@with_state
def test_every_device_masked(loss):
    """The loss is 0, and the state stays unchanged."""
    nothing = np.zeros(16, bool)
    step, (learned, fixed, state, _) = inside(loss, nothing)
    value, gradients, after = step(learned, fixed, state, jnp.asarray(nothing))
    assert (value == 0).all()
    assert all((x == 0).all() for x in jax.tree.leaves(gradients))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(after, state, strict=True))


@slow
def test_a_combined_loss_hands_the_axis_on():
    config = {"MODEL": {"FEAT_DIM": 6, "METRIC_LOSS_TYPE": "kd-dino-diff", "KD_LOSS_WEIGHT": [1.0, 2.0]}}
    rng = np.random.default_rng(0)
    feat = {k: jnp.asarray(rng.normal(size=(16, 6)), "float32") for k in ("stu", "tea", "score_stu", "score_tea")}
    # two views stacked on the batch axis, on every device
    views = {
        k: x.reshape(2, 8, 1, 6).swapaxes(0, 1).reshape(16, 6) if k in ("stu", "tea") else x for k, x in feat.items()
    }
    whole = kdjax.make_loss(config, 6, 20)(feat=feat)

    def local(feat):
        return kdjax.make_loss(config, 6, 20)(feat=feat, axis_name="batch")[None]

    parts = jax.jit(jax.shard_map(local, mesh=mesh(8), in_specs=P("batch"), out_specs=P("batch")))(views)
    assert float(parts.mean()) == pytest.approx(float(whole), rel=1e-6)


@slow
@pytest.mark.parametrize(
    "loss",
    [x for x in LOSSES if x.name in ("dcn_loss", "euclidean_mse_loss", "crcd_loss", "crd_loss")],
    ids=lambda x: x.title,
)
def test_a_mesh_of_explicit_axes(loss):
    """With explicit axes, shardings are part of the types; `auto_axes` leaves the loss to the compiler."""
    devices = jax.make_mesh((8,), ("batch",))
    (inputs, *_), state = given(loss)
    with jax.set_mesh(devices):
        function = jax.sharding.auto_axes(functools.partial(objective, loss, {}), out_sharding=P())
        step = jax.jit(jax.value_and_grad(function, has_aux=True))
        (value, state), gradients = step(*split(loss, placed(loss, devices, inputs)), state, None)
    agree([(value, gradients, state)], alone(loss.title, False)[:1])
