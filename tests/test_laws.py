"""Properties that all losses of the table have, in both packages."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from frameworks import BOTH, JAX, TORCH
from tiers import REPRESENTATIVES, first, one_of_a_kind, only, slow

from parity.calls import per_example
from parity.cases import KINDS, LOSSES, MAPS, Case, Loss, Sizes, along, cases, draw
from parity.check import check
from parity.compare import ulps
from parity.run import run


def named(loss):
    return str(Case(loss, "", ())).rstrip("-")


every = pytest.mark.parametrize("loss", LOSSES, ids=named)
learning = pytest.mark.parametrize("loss", [x for x in LOSSES if x.learns], ids=named)
learning_kind = pytest.mark.parametrize("loss", one_of_a_kind(x for x in LOSSES if x.learns), ids=named)
every_kind = pytest.mark.parametrize("loss", one_of_a_kind(LOSSES), ids=named)
framework = pytest.mark.parametrize("name", ["jax", "torch"])


def ordinary(loss):
    return next(cases(loss))


def values(name, case, **changes):
    return run(name, dataclasses.replace(case, **changes), gradients=False).values


@every
@framework
def test_an_empty_batch(name, loss):
    case = Case(loss, "empty", draw(loss, Sizes(batch=(0,)), 0))
    assert values(name, case) == [0]
    assert values(name, case, reduction="none")[0].shape == (0,)


@pytest.mark.parametrize(
    ("name", "loss"),
    only(
        lambda x: x[0] == "torch" or x[1].name in REPRESENTATIVES,
        [(name, loss) for name in ("jax", "torch") for loss in LOSSES if loss.divergence],
    ),
    ids=lambda x: getattr(x, "title", x),
)
@pytest.mark.parametrize("distance", [1e-7, 1e-4])
def test_divergences(name, loss, distance):
    """A divergence is never negative, even if student and teacher are very close."""
    student, teacher = loss.first, loss.constant[0]
    rng = np.random.default_rng(0)
    for seed in range(3):
        (inputs,) = draw(loss, Sizes(), seed)

        def near(x):
            return [near(y) for y in x] if isinstance(x, list) else x + distance * rng.normal(size=x.shape)

        case = Case(loss, "near", ({**inputs, student: near(inputs[teacher])},), reduction="none")
        for dtype in ("float32", "float64"):
            (value,) = run(name, case, dtype, gradients=False).values
            assert (value >= 0).all()


def leaves(x):
    return x if isinstance(x, list) else [x]


def called(f, loss, dtype="float64", sizes=None, seed=0):
    """A function of only the first trained input, and that input."""
    (inputs,) = draw(loss, sizes or Sizes(), seed)
    inputs = f.arrays(inputs, dtype)
    options = {"channel_axis": 1} if MAPS & set(loss.inputs.values()) else {}
    if loss.state:
        later = f.arrays({k: np.array(v) for k, v in KINDS[loss.inputs[loss.state]].later.items()})
        inputs[loss.state] = getattr(f.kd, loss.inputs[loss.state])(**inputs[loss.state] | later)
    function, first = per_example(f.kd, loss), loss.first

    def value(x, **more):
        result = function(*(x if k == first else inputs[k] for k in loss.inputs), **options, **more)
        return result[0] if loss.state else result

    return value, inputs[first]


def close(a, b, limit=256):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert ulps(x, y, "float64") <= limit


@learning_kind
def test_second_derivative(loss):
    """That of kdjax is right; kdtorch's is the same, or an error. If a part of the loss is constant, they agree."""
    function, x = called(JAX, loss)
    direction = jax.tree.map(jnp.cos, x)

    def along_direction(f, function, direction):
        def slope(x):
            return sum((a * b).sum() for a, b in zip(leaves(f.grad(function)(x)), leaves(direction), strict=True))

        return slope

    slope = jax.jit(along_direction(JAX, function, direction))
    got = jax.jit(jax.grad(slope))(x)
    step = 1e-6
    moved = [jax.tree.map(lambda a, d, s=s: a + s * step * jnp.sin(d * 3), x, direction) for s in (1, -1)]
    difference = float(slope(moved[0]) - slope(moved[1])) / (2 * step)
    product = sum((a * jnp.sin(d * 3)).sum() for a, d in zip(leaves(got), leaves(direction), strict=True))
    if not loss.partly_constant:
        assert float(product) == pytest.approx(difference, rel=1e-5, abs=1e-8)

    function, x = called(TORCH, loss)
    slope = along_direction(TORCH, function, [TORCH.array(d) for d in leaves(direction)])
    if not loss.second_derivative:
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.func.grad(slope)(x)
        return
    theirs = torch.func.grad(slope)(x)
    close([TORCH.numpy(y) for y in leaves(theirs)], [np.asarray(y) for y in leaves(got)], 4096)


@slow
@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
def test_second_derivative_of_two_classes(name):
    """Besides the label there is only one class, so the softmax over the others is always 1."""
    results = []
    for f in BOTH:
        student, teacher = f.array(np.array([[0.3, -1.2]])), f.array(np.array([[2.0, 0.5]]))
        labels = f.array(np.array([1]))

        def slope(x, f=f, teacher=teacher, labels=labels):
            return (f.grad(lambda x: getattr(f.kd, name)(x, teacher, labels))(x) * teacher).sum()

        results.append(f.numpy(f.grad(slope)(student)))
    close([results[0]], [results[1]], 64)


def calls(f, loss):
    """The arguments of two calls with different numbers: inputs, a mask, and all settings as arrays; and a first
    state."""
    given = []
    for seed, share in ((0, 0.4), (1, 0.6)):
        (inputs,) = draw(loss, Sizes(), seed)
        state = inputs.pop(loss.state, None)
        inputs = [f.arrays(inputs[k]) for k in loss.inputs if k in inputs]
        settings = {k: f.array(np.array(low + share * (high - low))) for k, (low, high) in loss.ranges.items()}
        where = f.array(np.arange(5) != seed)
        given.append((inputs, settings, where))
        if seed == 0 and loss.state:
            first = getattr(f.kd, loss.inputs[loss.state])(**f.arrays(state))
    return *given, first if loss.state else None


def test_every_number_is_a_setting_that_moves():
    """The table has ranges for all options that may be numbers or arrays, and forms for those that must be numbers."""
    for loss in LOSSES:
        for f in BOTH:
            parameters = inspect.signature(getattr(f.kd, loss.name)).parameters.values()
            options = [x for x in parameters if x.kind is x.KEYWORD_ONLY]
            numbers = {k for k, v in loss.forms.items() if type(v[0]) is float}
            assert set(loss.ranges) == {x.name for x in options if x.annotation in ("Scalar", "Scalar | None")}
            assert numbers == {x.name for x in options if x.annotation == "float"}


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.forms], ids=named)
@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
def test_a_number_that_chooses_the_formula_is_no_array(f, loss):
    """An array is an error; an integer and a number of NumPy are accepted."""
    (inputs,) = draw(loss, Sizes(), 0)
    inputs = f.arrays(inputs)
    function = getattr(f.kd, loss.name)
    for name, values in ((k, v) for k, v in loss.forms.items() if type(v[0]) is float):
        with pytest.raises(
            TypeError, match=rf"`{name}` must be a number, got .*; it determines .*: give float\({name}\)"
        ):
            function(**inputs, **{name: f.array(np.array(values[-1]))})
        for number in (int, np.float64):
            if number(values[-1]) == values[-1]:
                assert function(**inputs, **{name: number(values[-1])}) == function(**inputs, **{name: values[-1]})


@every_kind
def test_second_call_compiles_nothing(loss):
    """With other inputs, mask and settings, and the returned state; also for the gradient."""
    *both, state = calls(JAX, loss)
    options = {"channel_axis": 1} if MAPS & set(loss.inputs.values()) else {}
    learns = loss.first
    place = list(loss.inputs).index(learns)
    traces = []

    @jax.jit
    def step(inputs, settings, where, state):
        traces.append(1)

        def value(x):
            arguments = [*inputs[:place], x, *inputs[place + 1 :], *([state] if loss.state else [])]
            result = per_example(JAX.kd, loss)(*arguments, where=where, **settings, **options)
            return result if loss.state else (result, None)

        return jax.value_and_grad(value, has_aux=True)(inputs[place])

    values = []
    for given in both:
        (value, state), _ = step(*given, state)
        values.append(float(value))
    assert len(traces) == 1
    assert values[0] != values[1]


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@every_kind
def test_second_call_compiles_nothing_in_torch(loss):
    """With other inputs, mask and settings, and the returned state; the results are those of eager PyTorch."""
    *both, state = calls(TORCH, loss)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    function = per_example(TORCH.kd, loss)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for inputs, settings, where in both:
        arguments = [*inputs, *([state] if loss.state else [])]
        results = [call(*arguments, where=where, **settings) for call in (compiled, function)]
        values, states = zip(*results, strict=True) if loss.state else (results, (None, None))
        close(*(x.numpy() for x in values))
        state = states[0]
    assert counter.frame_count == 1


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
@pytest.mark.parametrize("loss", [x for x in LOSSES if not x.batch_coupled], ids=named)
def test_chunks_of_a_sum_are_the_whole(f, loss):
    """The sum of `reduction="sum"` over parts of a masked batch has the value and gradients of the whole batch."""
    sizes = Sizes((3, 2) if loss.leading else (6,))
    (inputs,) = draw(loss, sizes, 0)
    state = inputs.pop(loss.state, None)
    state = [getattr(f.kd, loss.inputs[loss.state])(**f.arrays(state))] if state else []
    options = {"channel_axis": 1} if MAPS & set(loss.inputs.values()) else {}
    kept = np.arange(6).reshape(sizes.batch) != 4
    learns = loss.learns

    @f.jit
    def value_and_slopes(free, fixed, where):
        def total(free):
            given = {**free, **fixed}
            arguments = (given[k] for k in loss.inputs if k in given)
            result = per_example(f.kd, loss)(*arguments, *state, where=where, reduction="sum", **options)
            value = result[0] if state else result
            return value, value

        return f.grad(total, has_aux=True)(free)

    def run_it(examples):
        part = f.arrays(along(loss, inputs, lambda x, axis: np.take(x, examples, axis)))
        free = {k: part.pop(k) for k in learns}
        slopes, value = value_and_slopes(free, part, f.array(kept[examples]))
        return f.numpy(value), {k: [f.numpy(x) for x in leaves(slopes[k])] for k in learns}

    number = sizes.batch[0]
    value, slopes = run_it(np.arange(number))
    chunks = [run_it(np.array(part)) for part in np.array_split(np.arange(number), 3)]
    assert ulps(sum(x for x, _ in chunks), value, "float64") <= 64
    for k in learns:
        axis = KINDS[loss.inputs[k]].axis
        for i, whole in enumerate(slopes[k]):
            pieces = [found[k][i] for _, found in chunks]
            close([sum(pieces) if axis is None else np.concatenate(pieces, axis)], [whole], 256)


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@learning_kind
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(backend, loss):
    function, x = called(TORCH, loss)
    torch._dynamo.reset()
    results = []
    for run_it in (function, torch.compile(function, fullgraph=True, backend=backend)):
        given = [y.clone().requires_grad_() for y in leaves(x)]
        run_it(given if isinstance(x, list) else given[0]).backward()
        results.append([y.grad.numpy() for y in given])
    close(*results)


@framework
@pytest.mark.parametrize("loss", [x for x in LOSSES if x.infinite], ids=named)
def test_infinite_where_the_student_excludes_a_class(name, loss):
    (inputs,) = draw(loss, Sizes(), 0)
    inputs["student_logits"][
        2, (np.argmax(inputs["labels"][2]) if "labels" in inputs and inputs["labels"].ndim == 2 else 0)
    ] = -np.inf
    result = run(name, Case(loss, "excluded", (inputs,), reduction="none"))
    assert np.array_equal(np.isinf(result.values[0]), np.arange(5) == 2)
    assert np.isfinite(result.gradients[0]["student_logits"]).all()


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
@pytest.mark.parametrize("loss", [x for x in LOSSES if "labels" in x.inputs.values()], ids=named)
def test_labels_of_any_integer_dtype(f, loss):
    """Also with more classes than the dtype can count."""
    (inputs,) = draw(loss, Sizes((4,), 300), 0)
    given = {**f.arrays(inputs), "labels": f.array(np.array([0, 5, 100, 127]))}

    def values(labels):
        return f.numpy(getattr(f.kd, loss.name)(**{**given, "labels": labels}, reduction="none"))

    def array(labels, dtype):
        return (jnp.asarray if f is JAX else torch.from_numpy)(np.array(labels, dtype))

    want = values(given["labels"])
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32", "uint64", "int64"):
        assert np.array_equal(values(array([0, 5, 100, 127], dtype)), want), dtype
    wrong = [0, 5, -1, 127]
    if f is JAX:
        assert np.array_equal(np.isnan(values(array(wrong, "int8"))), np.array(wrong) < 0)
    else:
        with pytest.raises(IndexError, match=r"0 .. 299, got -1"):
            values(array(wrong, "int8"))


def slopes(loss, device=None):
    """Value and gradient in PyTorch, with another default device."""
    function, x = called(TORCH, loss)
    given = [y.clone().requires_grad_() for y in leaves(x)]
    with torch.device(device or "cpu"):
        value = function(given if isinstance(x, list) else given[0])
        value.backward()
    return [value.detach(), *(y.grad for y in given)]


@learning
def test_the_default_device_is_not_asked(loss):
    assert all(map(torch.equal, slopes(loss), slopes(loss, "meta")))


@every
def test_shapes_alone(loss):
    """Tensors without data work, forward and backward."""
    (inputs,) = draw(loss, Sizes(), 0)
    inputs = TORCH.arrays(inputs)
    if loss.state:
        inputs["state"] = getattr(TORCH.kd, loss.inputs["state"])(
            **{k: v.to("meta") for k, v in inputs["state"].items()}
        )
    given = {k: [y.to("meta") for y in leaves(v)] for k, v in inputs.items() if k != "state"}
    learned = [x.requires_grad_() for k in loss.learns[:1] for x in given[k]]
    arguments = {k: given[k] if isinstance(v, list) else given[k][0] for k, v in inputs.items() if k in given}
    result = per_example(TORCH.kd, loss)(**arguments, **{k: v for k, v in inputs.items() if k == "state"})
    value = result[0] if loss.state else result
    assert value.device.type == "meta"
    if learned:
        value.backward()
    assert all(x.grad.shape == x.shape and x.grad.device.type == "meta" for x in learned)


@pytest.mark.parametrize(
    ("loss", "sizes"),
    [(x, Sizes()) for x in LOSSES if x.learns]
    + [(x, Sizes((300,), 2000)) for x in LOSSES if "logits" in x.inputs.values() and not x.batch_coupled],
    ids=lambda x: named(x) if isinstance(x, Loss) else f"{x.classes} classes",
)
def test_values_may_be_written_into(loss, sizes):
    """`loss(..., reduction="none")` may be multiplied by weights in place; wide rows are computed in blocks."""
    function, x = called(TORCH, loss, sizes=sizes)
    gradients = []
    for multiply in (torch.Tensor.mul, torch.Tensor.mul_):
        given = [y.clone().requires_grad_() for y in leaves(x)]
        multiply(function(given if isinstance(x, list) else given[0], reduction="none"), 3.0).sum().backward()
        gradients.append([y.grad for y in given])
    assert all(map(torch.equal, *gradients))


@learning
def test_gradients_of_many_cotangents_at_once(loss):
    function, x = called(TORCH, loss)
    given = [y.clone().requires_grad_() for y in leaves(x)]
    values = function(given if isinstance(x, list) else given[0], reduction="none")
    basis = torch.eye(len(values), dtype=values.dtype)
    together = torch.autograd.grad(values, given, basis, is_grads_batched=True, retain_graph=True)
    for i, above in enumerate(basis):
        close(
            [y[i].numpy() for y in together],
            [y.numpy() for y in torch.autograd.grad(values, given, above, retain_graph=True)],
        )


@slow
@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if (x.padding and not x.batch_coupled) or x.name == "uskd_loss"], ids=named
)
def test_no_nan_on_the_way(loss):
    """`jax_debug_nans`, which checks each operation outside of `jit`, finds no NaN, even with a padded class.

    With two classes, one of them padding, the label is the only class.
    """
    for classes in (4, 2):
        (inputs,) = draw(loss, Sizes(batch=(2,), classes=classes), 0)
        for key in list(inputs)[:2]:
            inputs[key][:, -1] = -np.inf
        if loss.inputs.get("labels") == "labels":
            inputs["labels"] = np.array([0, classes // 3])
        elif "labels" in loss.inputs:
            inputs["labels"] = np.eye(classes)[[0, classes // 3]]
        student, *others = JAX.arrays(inputs).values()
        with jax.debug_nans(True):
            assert jnp.isfinite(jax.grad(per_example(JAX.kd, loss))(student, *others)).all()
            if "temperature" in loss.ranges:
                function = functools.partial(per_example(JAX.kd, loss), student, *others)
                assert jnp.isfinite(jax.grad(lambda t, f=function: f(temperature=t))(jnp.asarray(2.0)))


@slow
def test_one_hot_labels_are_labels():
    for loss in (x for x in LOSSES if "distribution" in x.inputs.values()):
        for f in BOTH:
            function = getattr(f.kd, loss.name)
            (inputs,) = draw(loss, Sizes(), 0)
            labels = inputs["labels"].argmax(-1)
            logits = [f.array(inputs[k]) for k in list(loss.inputs)[:2]]
            hot = function(*logits, f.array(np.eye(Sizes().classes)[labels]))
            assert ulps(f.numpy(hot), f.numpy(function(*logits, f.array(labels))), "float64") <= 4


@slow
def test_close_memories_keep_their_digits():
    """CRCD in float32 on rows that nearly coincide, where matrix products would lose all digits."""
    loss = next(x for x in LOSSES if x.name == "crcd_loss")
    (inputs,) = draw(loss, Sizes(), 0)
    for memory in ("student_memory", "teacher_memory"):
        x = inputs["state"][memory]
        x[1:6] = x[0] + 1e-3 * x[1:6]
        inputs["state"][memory] = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    case = Case(loss, "close", (inputs,))
    assert all(x.passed for x in check(case, "float32"))


def rows_that_leave_out_classes(span):
    """The only common class of the first two rows is the smallest of one and the largest of the other."""
    rows = np.array([[0, -np.inf, -span, 0.4 - span], [-np.inf, -span, 0, 0.7], [0.1, 0.5, -0.3, 0.2]])
    return rows, rows + np.random.default_rng(0).normal(size=rows.shape)


def a_class_that_the_teacher_alone_leaves_out():
    student, teacher = np.random.default_rng(1).normal(size=(2, 3, 5))
    teacher[1, 2] = -np.inf
    return student, teacher


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("span", first(2, [None, 45.0, 5.0, 70.0, 300.0, 560.0, 700.0]))
def test_differences_of_rows_that_leave_out_classes(span, dtype):
    """Difference KL at spans within and beyond the reach of its methods; with None, only the teacher has a class at
    -inf."""
    loss = next(x for x in LOSSES if x.name == "difference_kl_loss")
    logits = rows_that_leave_out_classes(span) if span else a_class_that_the_teacher_alone_leaves_out()
    inputs = dict(zip(loss.inputs, (x.astype(np.float32).astype(float) for x in logits), strict=True))
    case = Case(loss, "left out", (inputs,), reduction="none")
    want = run("oracle", case)
    assert want.values[0].max() > 0.04
    for name in ("jax", "torch"):
        got = run(name, case, dtype)
        pairs = (got.values[0], want.values[0]), (got.gradients[0][loss.learns[0]], want.gradients[0][loss.learns[0]])
        for a, b in pairs:
            # the columns of the logits are centred, which rounds them to this accuracy
            assert np.abs(a - b).max() <= 4 * max(span or 0, 8) * np.finfo(dtype).eps * np.abs(b).max()


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["crcd_loss", "crd_loss"])
def test_of_two_rows_with_one_index_the_later_is_remembered(f, name):
    loss = next(x for x in LOSSES if x.name == name)
    (inputs,) = draw(loss, Sizes(), 0)
    inputs["index"] = np.array([4, 7, 4, 7, 4])
    given = f.arrays(inputs)
    state = getattr(f.kd, loss.inputs["state"])(**given.pop("state"))
    _, after = getattr(f.kd, name)(*given.values(), state)
    for row, index in ((4, 4), (3, 7)):
        unit = inputs["student"][row] / np.linalg.norm(inputs["student"][row])
        want = (inputs["state"]["student_memory"][index] + unit) / 2
        want /= np.linalg.norm(want)
        assert f.numpy(after.student_memory[index]) == pytest.approx(want, rel=1e-12)


@slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@every
def test_autocast_does_not_round_what_is_compiled(loss):
    function, x = called(TORCH, loss, "float32")

    def inside(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(x)

    torch._dynamo.reset()
    value = torch.compile(inside, fullgraph=True, backend="aot_eager")(x)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(function(x).item(), rel=1e-5)


@learning
def test_autocast_does_not_round_backward(loss):
    function, x = called(TORCH, loss, "float32")
    slopes = []
    for enabled in (True, False):
        given = [y.clone().requires_grad_() for y in leaves(x)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            function(given if isinstance(x, list) else given[0]).backward()
        slopes.append([y.grad for y in given])
    assert all(map(torch.equal, *slopes))


def test_autocast_does_not_round():
    """A loss gives the same result under PyTorch's autocast as outside."""
    for loss in LOSSES:
        function, x = called(TORCH, loss, "float32")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = function(x)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, function(x))
