"""Compares both packages and the oracle with values that published code returned, in tests/golden.

The `meta` of a file may have, in addition to `function`, `kwargs`, `source` and `note`:

- `inputs`: the arguments before the state, in order: the arrays `in_NAME`; `in_where`, if there is one, is the mask;
- `counts`: the inputs that are lists, and their numbers of arrays: `in_NAME_0`, `in_NAME_1`, …;
- `layouts`: the inputs that are feature maps, always `"NCHW"`;
- `grads`: the inputs whose gradients are in the file, `grad_NAME`;
- `returns`: `"array"` if the result is an array, `out_array`; then the gradients are those of the sum of the array
  times `in_cotangent`;
- `state`: the fields of a state; it starts at `in_FIELD`, or at 0, and is `state_FIELD_0` after the first step;
- `steps`: the number of steps, each with its own arrays: `in_NAME_0`, `out_loss_0`, …; `step_kwargs`: the settings of
    each;
- `renamed`: prefixes of arrays with other names;
- `through`: a function that is applied to some of the inputs first, with its `kwargs` and the names of these `inputs`;
  `factor`: a factor for the value.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch
from frameworks import BOTH, JAX, TORCH
from tiers import REPRESENTATIVES, only

import kdjax
import kdtorch
from parity.cases import LOSSES, Case, Sizes, draw, each_array
from parity.compare import difference
from parity.run import run, upstream

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))
# relative to the value, and to the gradient's largest entry. The released code of the Euclidean distances clamps their
# squares at 1e-12, which changes results by 5e-13; everything else agrees up to rounding.
LIMITS = {"float64": (1e-12, 1e-11), "float32": (3e-6, 1e-5)}


def load(path):
    with np.load(path) as data:
        return json.loads(bytes(data["meta"])), {key: data[key] for key in data.files if key != "meta"}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a function, and the published results: the value, the gradients by input, and the next state.

    Each of several steps starts from the published state of the previous step. Maps have their channels second. `first`
    has the function that is applied to an input first, by name, if there is one.
    """

    name: str
    function: str
    inputs: dict[str, Any]
    maps: tuple[str, ...]
    options: dict[str, Any]
    where: np.ndarray | None
    state: dict[str, np.ndarray]
    cotangent: np.ndarray
    value: np.ndarray
    gradients: dict[str, Any]
    after: dict[str, np.ndarray]
    first: dict[str, tuple[str, dict[str, Any]]]
    factor: float

    @property
    def loss(self):
        """The row of the table."""
        soft = "labels" in self.inputs and self.inputs["labels"].ndim == 2
        return next(x for x in LOSSES if x.name == self.function and ("distribution" in x.inputs.values()) == soft)


def published(path):
    """The calls of a file."""
    meta, data = load(path)
    steps, through = meta.get("steps"), meta.get("through")

    def array(prefix, name, suffix):
        key = meta.get("renamed", {}).get(f"{prefix}_{name}", f"{prefix}_{name}")
        number = meta.get("counts", {}).get(name)
        return data[f"{key}{suffix}"] if number is None else [data[f"{key}{suffix}_{i}"] for i in range(number)]

    for step in range(steps or 1):
        suffix = "" if steps is None else f"_{step}"
        out = data[f"out_{meta.get('returns', 'loss')}{suffix}"]
        after = {k: data[f"state_{k}_{step}"] for k in meta.get("state", ())}
        before = {k: data[f"state_{k}_{step - 1}"] if step else data.get(f"in_{k}", 0 * v) for k, v in after.items()}
        yield Call(
            name=meta["case"] + suffix,
            function=meta["function"],
            inputs={k: array("in", k, suffix) for k in meta["inputs"]},
            maps=tuple(meta.get("layouts", ())),
            options={**meta["kwargs"], **meta.get("step_kwargs", [{}] * (step + 1))[step]},
            where=data.get(f"in_where{suffix}"),
            state=before,
            cotangent=data.get("in_cotangent", np.ones(())),
            value=out,
            gradients={k: array("grad", k, suffix) for k in meta["grads"]},
            after=after,
            first=dict.fromkeys(through["inputs"], (through["function"], through["kwargs"])) if through else {},
            factor=meta.get("factor", 1.0),
        )


CALLS = [call for path in FILES if load(path)[0]["function"] != "make_loss" for call in published(path)]


def evaluate(f, call, dtype):
    """The value, the gradients of trained and constant inputs, and the next state."""

    def turned(name, x, source, place):
        return each_array(x, lambda y: np.moveaxis(y, source, place)) if f is JAX and name in call.maps else x

    loss, function = call.loss, getattr(f.kd, call.function)
    names = dict(zip(loss.inputs, call.inputs, strict=False))  # the row's names, and the file's
    constant = [names[k] for k in loss.constant if k in names]
    inputs = {k: f.arrays(turned(k, x, 1, -1), dtype) for k, x in call.inputs.items()}
    state = [getattr(f.kd, loss.inputs[loss.state])(**f.arrays(call.state, dtype))] if call.state else []
    options = call.options if call.where is None else {**call.options, "where": f.array(call.where)}
    cotangent = f.array(call.cotangent, dtype)

    def objective(free):
        given = {**inputs, **free}
        for k, (name, settings) in call.first.items():
            given[k] = getattr(f.kd, name)(given[k], **settings)
        value = function(*given.values(), *state, **options)
        value, after = (value[0], value[1]._asdict()) if state else (value, {})
        value = value * call.factor
        return (value * cotangent).sum(), (value, after)

    free = {k: inputs[k] for k in (*call.gradients, *constant)}
    slopes, (value, after) = f.jit(f.grad(objective, has_aux=True))(free)
    slopes = {k: turned(k, numpy(f, x), -1, 1) for k, x in slopes.items()}
    zero = {k: slopes.pop(k) for k in constant}
    return f.numpy(value), slopes, zero, {k: f.numpy(x) for k, x in after.items()}


def numpy(f, x):
    return [f.numpy(y) for y in x] if isinstance(x, list) else f.numpy(x)


def compared(call, dtype, sides, *parts):
    """Each part as (name, result, published value); raises an error unless they agree."""
    for part, got, want in parts:
        limit = LIMITS[dtype][part != "value"] / np.finfo(dtype).eps
        names = {"subject": call.function, "case": call.name, "dtype": dtype, "names": sides}
        found = difference([got], [want], limit=limit, expected=dtype, part=part, **names)
        assert found.passed, str(found)


def array_of(name, x, settings, where=None):
    """Apply the oracle's function of rows to an array with any leading axes; masked rows become 0."""
    formula = next(loss.formula for loss in LOSSES if loss.name == name)
    rows = x.astype(np.longdouble).reshape(-1, x.shape[-1])
    kept = np.ones(len(rows), bool) if where is None else where.reshape(-1)
    result = np.zeros_like(rows)
    result[kept] = formula(rows[kept], **settings)
    return result.reshape(x.shape)


FIRST = {call.function: call for call in reversed(CALLS)}
# JAX compiles the sizes of each file: in float32 only those of the first file of a function
RUNS = [
    (call, f, dtype)
    for call in CALLS
    for f in BOTH
    for dtype in ("float64", "float32")
    if f is TORCH or dtype == "float64" or FIRST[call.function] is call
]


def is_quick(case):
    call, f, dtype = case
    alone = FIRST[call.function] is call and call.function in REPRESENTATIVES
    return dtype == "float64" and (f is TORCH or alone)


@pytest.mark.parametrize(("call", "f", "dtype"), only(is_quick, RUNS), ids=lambda x: getattr(x, "name", x))
def test_packages(call, f, dtype):
    value, gradients, constant, after = evaluate(f, call, dtype)
    compared(
        call,
        dtype,
        (f.name, "published"),
        ("value", value, call.value),
        ("gradient", gradients, call.gradients),
        ("state", after, call.after),
    )
    assert all((x == 0).all() for x in jax.tree.leaves(constant))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_oracle(call, dtype):
    """Its gradients, which need a step for each entry, are compared with the packages' on small cases instead."""
    sides = ("oracle", "published")
    given = dict(call.inputs)
    for k, (name, settings) in call.first.items():
        given[k] = array_of(name, given[k], settings)
    inputs = dict(zip(call.loss.inputs, (*given.values(), *([call.state] if call.state else [])), strict=False))
    options = {k: v for k, v in call.options.items() if k != "reduction"}
    if call.loss.value == "array":
        (x,) = given.values()
        compared(
            call, dtype, sides, ("value", array_of(call.function, x, options, call.where).astype(dtype), call.value)
        )
        return
    reduction = call.options.get("reduction", "mean")
    got = run("oracle", Case(call.loss, "", (inputs,), options, call.where, reduction), dtype, gradients=False)
    # the oracle computes with more digits than either dtype has
    after = {k: x.astype(dtype) for states in got.states for k, x in states.items()}
    value = call.factor * got.values[0].astype(dtype)
    compared(call, dtype, sides, ("value", value, call.value), ("state", after, call.after))


@pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
def test_a_mask_and_an_array(f, tmp_path):
    """What no file uses yet: a file from the oracle's results passes, and fails if one of them is wrong."""
    loss = next(x for x in LOSSES if x.name == "dkd_loss")
    (inputs,) = draw(loss, Sizes(), 0)
    where = np.arange(5) != 2
    case = Case(loss, "", (inputs,), where=where, reduction="none")
    exact = run("oracle", case)
    meta = {"function": loss.name, "kwargs": {"reduction": "none"}, "inputs": list(inputs), "grads": list(loss.learns)}
    arrays = {f"in_{k}": x for k, x in inputs.items()} | {"in_where": where, "in_cotangent": upstream(case, (5,))}
    arrays |= {f"grad_{k}": exact.gradients[0][k].astype("float64") for k in loss.learns}
    for factor in (1.0, 1.0001):
        text = json.dumps({**meta, "returns": "array", "case": "masked"})
        value = factor * exact.values[0].astype("float64")
        np.savez(tmp_path / "masked.npz", meta=np.frombuffer(text.encode(), np.uint8), out_array=value, **arrays)
        (call,) = published(tmp_path / "masked.npz")
        if factor == 1:
            test_oracle(call, "float64")
            test_packages(call, f, "float64")
        else:
            with pytest.raises(AssertionError, match="value"):
                test_packages(call, f, "float64")


@pytest.mark.parametrize("package", [kdjax, kdtorch])
@pytest.mark.parametrize("path", [p for p in FILES if "epochs" in load(p)[0]], ids=lambda p: p.stem)
def test_teacher_temperature(path, package):
    meta, _ = load(path)
    schedule = {key: meta[key] for key in ("warmup", "final", "warmup_epochs")}
    for epoch, want in zip(meta["epochs"], meta["teacher_temperatures"], strict=True):
        assert float(package.dino_teacher_temperature(epoch, **schedule)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 3, 30])
def test_teacher_temperature_follows_the_released_table(warmup_epochs):
    """`np.linspace` and then the final temperature, for integers and arrays, outside and inside a compiled program."""
    epochs, schedule = 33, {"warmup": 0.04, "final": 0.07, "warmup_epochs": warmup_epochs}
    table = np.concatenate([np.linspace(0.04, 0.07, warmup_epochs), np.full(epochs - warmup_epochs, 0.07)])
    ours = jax.jit(lambda epoch: kdjax.dino_teacher_temperature(epoch, **schedule))
    theirs = torch.compile(
        lambda epoch: kdtorch.dino_teacher_temperature(epoch, **schedule), backend="eager", fullgraph=True
    )
    for epoch in (0, 1, 2, 29, 32):
        for got in (
            kdjax.dino_teacher_temperature(epoch, **schedule),
            kdtorch.dino_teacher_temperature(epoch, **schedule),
            ours(epoch),
        ):
            assert float(got) == pytest.approx(table[epoch], rel=1e-12)
    every = np.arange(epochs)
    for got in (ours(every), kdjax.dino_teacher_temperature(every, **schedule)):
        np.testing.assert_allclose(got, table, rtol=1e-12)
    for function in (theirs, lambda epoch: kdtorch.dino_teacher_temperature(epoch, **schedule)):
        np.testing.assert_allclose(function(torch.from_numpy(every)), table, rtol=1e-12)
