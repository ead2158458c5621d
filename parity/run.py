"""A case through kdjax, kdtorch or the oracle."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.cases import KINDS, Case, _each_array

Step = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a case gave, in NumPy: the values, the gradients by input and the states by field, of each step.

    The gradient is that of `sum(upstream * value)`. Values, gradients and states are in the dtype they came in.
    """

    values: list[np.ndarray]
    gradients: list[dict[str, Any]]
    states: list[dict[str, np.ndarray]]


def upstream(case: Case, shape: tuple[int, ...]) -> np.ndarray:
    """A gradient from above that is not 1, unless the case asks for that."""
    if case.seed is None:
        return np.ones(shape)
    return np.random.default_rng(case.seed).uniform(0.5, 2.0, shape).astype(np.float32).astype(np.float64)


def run(framework: str, case: Case, dtype: str = "float64", gradients: bool = True) -> Result:
    """Run a case in `"jax"` (under jit), `"torch"` or `"oracle"`, on inputs of `dtype`."""
    step = {"jax": _jax, "torch": _torch, "oracle": _oracle}[framework](case, dtype, gradients)
    result = Result([], [], [])
    state = None
    for inputs in case.steps:
        value, gradient, state = step(_each_array(inputs, lambda x: _cast(x, dtype)), state)
        result.values.append(value)
        result.gradients.append(gradient)
        if state is not None:
            result.states.append(state)
    return result


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    # half precision is rounded here and handed over in float32, which the frameworks cast without loss
    if x.dtype.kind != "f":
        return x
    return x.astype("float32" if dtype in ("float16", "bfloat16") else dtype)


def _jax(case: Case, dtype: str, gradients: bool) -> Callable:
    import jax.numpy as jnp

    package, learns = importlib.import_module("kdjax"), case.loss.learns + case.loss.constant
    state_dtype = "float64" if dtype == "float64" else "float32"

    def array(x: np.ndarray, kind: str) -> Any:
        if x.dtype.kind == "f":
            x = np.moveaxis(x, 1, -1) if kind == "maps" else x
            return jnp.asarray(x, state_dtype if kind.endswith("State") else dtype)
        return jnp.asarray(x, "int32")

    options = tuple(case.options.items())
    evaluate = _jax_program(case.loss.name, tuple(case.loss.inputs), options, case.reduction, gradients)

    def step(inputs: dict[str, Any], state: Any) -> tuple[Any, Any, Any]:
        inputs = {**inputs, **_given(case, state)}
        given = {k: _each_array(v, functools.partial(array, kind=case.loss.inputs[k])) for k, v in inputs.items()}
        if case.loss.state:
            given[case.loss.state] = getattr(package, case.loss.inputs[case.loss.state])(**given[case.loss.state])
        free = {k: v for k, v in given.items() if k in learns}
        fixed = {k: v for k, v in given.items() if k not in learns}
        result = evaluate(free, fixed, case.where, jnp.asarray(upstream(case, _value_shape(case))))
        (_, (value, state)), slopes = result if gradients else (result, {})
        state = None if state is None else {k: np.asarray(v) for k, v in state._asdict().items()}
        return np.asarray(value), {k: _back(v, case.loss.inputs[k], -1) for k, v in slopes.items()}, state

    return step


@functools.cache
def _jax_program(name: str, order: tuple[str, ...], options: tuple, reduction: str, gradients: bool) -> Callable:
    """One jitted function for all cases that differ in arrays alone."""
    import jax
    import jax.numpy as jnp

    function = getattr(importlib.import_module("kdjax"), name)

    def objective(free: Any, fixed: Any, where: Any, cotangent: Any) -> Any:
        inputs = {**free, **fixed}
        value = function(*(inputs[k] for k in order), **dict(options), where=where, reduction=reduction)
        value, state = value if isinstance(value, tuple) else (value, None)
        return jnp.sum(value * cotangent.astype(value.dtype)), (value, state)

    return jax.jit(jax.value_and_grad(objective, has_aux=True) if gradients else objective)


def _torch(case: Case, dtype: str, gradients: bool) -> Callable:
    import torch

    package = importlib.import_module("kdtorch")
    function, learns = getattr(package, case.loss.name), case.loss.learns + case.loss.constant
    state_dtype = "float64" if dtype == "float64" else "float32"
    where = None if case.where is None else torch.from_numpy(case.where)

    def array(x: np.ndarray, kind: str, learned: bool) -> Any:
        tensor = torch.from_numpy(np.array(x))
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(getattr(torch, state_dtype if kind.endswith("State") else dtype))
        return tensor.requires_grad_() if learned and gradients else tensor

    def step(inputs: dict[str, Any], state: Any) -> tuple[Any, Any, Any]:
        inputs = {**inputs, **_given(case, state)}
        given = {
            k: _each_array(v, functools.partial(array, kind=case.loss.inputs[k], learned=k in learns))
            for k, v in inputs.items()
        }
        if case.loss.state:
            given[case.loss.state] = getattr(package, case.loss.inputs[case.loss.state])(**given[case.loss.state])
        value = function(*(given[k] for k in case.loss.inputs), **case.options, where=where, reduction=case.reduction)
        value, state = value if case.loss.state else (value, None)
        slopes = {}
        if gradients:
            cotangent = torch.from_numpy(upstream(case, _value_shape(case)))
            (value * cotangent.to(value.dtype)).sum().backward()
            slopes = {
                k: _each_leaf(given[k], lambda x: torch.zeros_like(x) if x.grad is None else x.grad) for k in learns
            }
        state = None if state is None else {k: v.numpy() for k, v in state._asdict().items()}
        return value.detach().numpy(), {k: _back(v, case.loss.inputs[k], 1) for k, v in slopes.items()}, state

    return step


def _given(case: Case, state: Any) -> dict[str, Any]:
    """The state of the step before, under its name."""
    return {} if state is None or case.loss.state is None else {case.loss.state: state}


def _each_leaf(x: Any, function: Callable) -> Any:
    return [function(y) for y in x] if isinstance(x, list) else function(x)


def _back(x: Any, kind: str, channel_axis: int) -> Any:
    def one(g: Any) -> np.ndarray:
        if str(g.dtype).endswith("bfloat16"):
            g = g.astype("float32") if hasattr(g, "astype") else g.float()
        g = np.asarray(g)
        return np.moveaxis(g, channel_axis, 1) if kind == "maps" else g

    return _each_leaf(x, one)


def _value_shape(case: Case) -> tuple[int, ...]:
    return _batch(case, case.steps[0]) if case.reduction == "none" else ()


def _batch(case: Case, inputs: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the examples."""
    name, kind = next((n, k) for n, k in case.loss.inputs.items() if KINDS[k].axis is not None)
    first = inputs[name][0] if isinstance(inputs[name], list) else inputs[name]
    return first.shape[:-1] if case.loss.leading else (first.shape[KINDS[kind].axis],)


def _oracle(case: Case, dtype: str, gradients: bool) -> Callable:
    function = getattr(importlib.import_module("parity.oracle"), case.loss.name)
    options = {k: np.dtype(_cast(np.zeros(1), dtype).dtype).type(v) for k, v in case.options.items()}
    number = int(np.prod(_batch(case, case.steps[0])))
    kept = np.arange(number) if case.where is None else np.flatnonzero(case.where)
    cotangent = upstream(case, _value_shape(case))

    def values(inputs: dict[str, Any]) -> tuple[Any, Any]:
        value = function(*(inputs[k] for k in case.loss.inputs), **options) if len(kept) else []
        value, state = value if case.loss.state and len(kept) else (value, inputs.get(str(case.loss.state)))
        if case.reduction == "none":
            full = np.zeros(number, dtype=np.result_type(np.longdouble, *map(np.asarray, value)))
            full[kept] = value
            return full.reshape(cotangent.shape), state
        total = sum(value, np.longdouble(0))
        return total / max(len(kept), 1) if case.reduction == "mean" else total, state

    def step(inputs: dict[str, Any], state: Any) -> tuple[Any, Any, Any]:
        inputs = {**inputs, **_given(case, state)}
        dropped = {k: _each_array(v, functools.partial(_examples, case, k, kept)) for k, v in inputs.items()}
        value, state = values(dropped)
        slopes: dict[str, Any] = {k: _each_leaf(inputs[k], np.zeros_like) for k in case.loss.constant}
        for k in case.loss.learns if gradients else ():
            slopes[k] = _complex_step(dropped, k, lambda x: np.sum(cotangent * values(x)[0]))
            slopes[k] = (
                [_undrop(case, k, g, x, kept) for g, x in zip(slopes[k], inputs[k], strict=True)]
                if isinstance(inputs[k], list)
                else _undrop(case, k, slopes[k], inputs[k], kept)
            )
        return np.asarray(value), slopes, state

    return step


def _examples(case: Case, name: str, kept: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The kept examples, on one axis, in extended precision."""
    x = x.astype(np.longdouble) if x.dtype.kind == "f" else x
    axis = KINDS[case.loss.inputs[name]].axis
    if axis is None:
        return x
    if case.loss.leading:
        batch = _batch(case, case.steps[0])
        x = x.reshape(-1, *x.shape[len(batch) :])
    return np.take(x, kept, axis)


def _undrop(case: Case, name: str, gradient: np.ndarray, like: np.ndarray, kept: np.ndarray) -> np.ndarray:
    axis = KINDS[case.loss.inputs[name]].axis
    if axis is None:
        return gradient
    full = np.zeros(like.shape, gradient.dtype)
    if case.loss.leading:
        full = full.reshape(-1, *like.shape[len(_batch(case, case.steps[0])) :])
    full = np.moveaxis(full, axis, 0)
    full[kept] = np.moveaxis(gradient, axis, 0)
    return np.moveaxis(full, 0, axis).reshape(like.shape)


def _complex_step(inputs: dict[str, Any], name: str, objective: Callable[[dict[str, Any]], Any]) -> Any:
    """The gradient: the imaginary part of the objective after a tiny imaginary step of one entry at a time."""
    tiny = 1e-100
    leaves = inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
    gradients = [np.zeros(leaf.shape, np.longdouble) for leaf in leaves]
    for which, leaf in enumerate(leaves):
        for place in np.ndindex(leaf.shape):
            if np.isfinite(leaf[place]):
                moved = leaf.astype(np.clongdouble)
                moved[place] += 1j * tiny
                changed: Any = [moved if i == which else x for i, x in enumerate(leaves)]
                changed = changed if isinstance(inputs[name], list) else changed[0]
                gradients[which][place] = np.imag(objective({**inputs, name: changed})) / tiny
    return gradients if isinstance(inputs[name], list) else gradients[0]
