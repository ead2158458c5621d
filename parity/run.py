"""Runs a case in kdjax, kdtorch or the oracle."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from kdlosses.trees import numpy_dtype
from parity.arrays import is_float, jax_array, rounded, to_numpy, torch_tensor
from parity.calls import per_example, weighted
from parity.cases import KINDS, MAPS, Case, each_array

FRAMEWORKS = ("jax", "torch", "torch-compiled")


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a case in NumPy: for each step the values, the gradients by input, and the states by field.

    The gradient is that of `sum(upstream * value)`. Values, gradients and states keep their dtypes.
    """

    values: list[np.ndarray]
    gradients: list[dict[str, Any]]
    states: list[dict[str, np.ndarray]]


def upstream(case: Case, shape: tuple[int, ...]) -> np.ndarray:
    """An upstream gradient that is not 1, unless the case has no seed."""
    if case.seed is None:
        return np.ones(shape)
    return np.random.default_rng(case.seed).uniform(0.5, 2.0, shape).astype(np.float32).astype(np.float64)


def run(framework: str, case: Case, dtype: str = "float64", gradients: bool = True, package: Any = None) -> Result:
    """Run a case in one of `FRAMEWORKS` (JAX under `jit`) or in the `"oracle"`, on inputs rounded to `dtype`.

    `package` may be another object than kdjax or kdtorch that has the loss, and its state, by the same names.
    """
    make = {"jax": _jax, "torch": _torch, "torch-compiled": _torch_compiled, "oracle": _oracle}[framework]
    step = make(case, dtype, gradients, package)
    result = Result([], [], [])
    state = None
    for inputs in case.steps:
        value, gradient, state = step(each_array(inputs, functools.partial(rounded, dtype=dtype)), state)
        result.values.append(value)
        result.gradients.append(gradient)
        if state is not None:
            result.states.append(state)
    return result


def result_dtype(dtype: str) -> str:
    """The dtype of values and states: half precision is computed and returned in float32."""
    return "float64" if dtype == "float64" else "float32"


def _arguments(
    case: Case, dtype: str, package: Any, array: Callable[..., Any], inputs: dict[str, Any], state: Any
) -> dict[str, Any]:
    """The inputs of a step as a framework's arrays, and the state in the package's own type."""
    given = {}
    for name, value in {**inputs, **_given(case, state)}.items():
        kind = case.loss.inputs[name]
        if kind.endswith("State"):
            fields = each_array(value, functools.partial(array, dtype=result_dtype(dtype)))
            given[name] = getattr(package, kind)(**fields)
        else:
            given[name] = each_array(value, functools.partial(array, dtype=dtype))
    return given


def _jax(case: Case, dtype: str, gradients: bool, package: Any) -> Callable:
    package = package or importlib.import_module("kdjax")
    learns = case.loss.learns + case.loss.constant
    order, options = tuple(case.loss.inputs), tuple(case.settings.items())
    evaluate = _jax_program(per_example(package, case.loss), order, options, case.reduction, gradients)
    maps = {k for k, kind in case.loss.inputs.items() if kind in MAPS}

    def step(inputs: dict[str, Any], state: Any) -> tuple[Any, Any, Any]:
        inputs = {k: each_array(v, lambda x: np.moveaxis(x, 1, -1)) if k in maps else v for k, v in inputs.items()}
        given = _arguments(case, dtype, package, jax_array, inputs, state)
        free = {k: v for k, v in given.items() if k in learns}
        fixed = {k: v for k, v in given.items() if k not in learns}
        result = evaluate(free, fixed, case.where, jax_array(upstream(case, _value_shape(case)), "float64"))
        (_, (value, state)), slopes = result if gradients else (result, {})
        slopes = {k: _each_leaf(v, to_numpy) for k, v in slopes.items()}
        slopes = {k: _each_leaf(v, lambda x: np.moveaxis(x, -1, 1)) if k in maps else v for k, v in slopes.items()}
        return to_numpy(value), slopes, _fields(state)

    return step


@functools.cache
def _jax_program(function: Callable, order: tuple[str, ...], options: tuple, reduction: str, gradients: bool) -> Any:
    """One jitted function for all cases that differ only in arrays."""
    import jax
    import jax.numpy as jnp

    def objective(free: Any, fixed: Any, where: Any, cotangent: Any) -> Any:
        inputs = {**free, **fixed}
        value = function(*(inputs[k] for k in order), **dict(options), where=where, reduction=reduction)
        value, state = value if isinstance(value, tuple) else (value, None)
        return jnp.sum(value * cotangent.astype(value.dtype)), (value, state)

    return jax.jit(jax.value_and_grad(objective, has_aux=True) if gradients else objective)


def forget() -> None:
    """Free the compiled programs, because each has memory maps, and their number per process is limited."""
    _jax_program.cache_clear()
    _torch_program.cache_clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _torch(case: Case, dtype: str, gradients: bool, package: Any, compiled: bool = False) -> Callable:
    import torch

    package = package or importlib.import_module("kdtorch")
    function, learns = per_example(package, case.loss), case.loss.learns + case.loss.constant
    function = _torch_program(function) if compiled else function
    where = None if case.where is None else torch.from_numpy(case.where)

    def step(inputs: dict[str, Any], state: Any) -> tuple[Any, Any, Any]:
        given = _arguments(case, dtype, package, torch_tensor, inputs, state)
        for k in learns if gradients else ():
            _each_leaf(given[k], lambda x: x.requires_grad_())
        value = function(*(given[k] for k in case.loss.inputs), **case.settings, where=where, reduction=case.reduction)
        value, state = value if isinstance(value, tuple) else (value, None)
        slopes = {}
        if gradients:
            if value.requires_grad:
                cotangent = torch.from_numpy(upstream(case, _value_shape(case)))
                (value * cotangent.to(value.dtype)).sum().backward()
            slopes = {
                k: _each_leaf(given[k], lambda x: to_numpy(torch.zeros_like(x) if x.grad is None else x.grad))
                for k in learns
            }
        return to_numpy(value), slopes, _fields(state)

    return step


def _torch_compiled(case: Case, dtype: str, gradients: bool, package: Any) -> Callable:
    return _torch(case, dtype, gradients, package, compiled=True)


@functools.cache
def _torch_program(function: Callable) -> Callable:
    import torch

    torch._dynamo.config.recompile_limit = 1000  # there is a program for each case
    return torch.compile(function, fullgraph=True, dynamic=False)


def _fields(state: Any) -> dict[str, np.ndarray] | None:
    return None if state is None else {name: to_numpy(value) for name, value in state._asdict().items()}


def _given(case: Case, state: Any) -> dict[str, Any]:
    """The state of the previous step, by its name."""
    return {} if state is None or case.loss.state is None else {case.loss.state: state}


def _each_leaf(x: Any, function: Callable) -> Any:
    return [function(y) for y in x] if isinstance(x, list) else function(x)


def _value_shape(case: Case) -> tuple[int, ...]:
    return _batch(case, case.steps[0]) if case.reduction == "none" else ()


def _batch(case: Case, inputs: dict[str, Any]) -> tuple[int, ...]:
    """The shape of the examples."""
    name, kind = next((n, k) for n, k in case.loss.inputs.items() if KINDS[k].axis is not None)
    first = inputs[name][0] if isinstance(inputs[name], list) else inputs[name]
    return first.shape[: first.ndim - KINDS[kind].axes] if case.loss.leading else (first.shape[KINDS[kind].axis],)


def _oracle(case: Case, dtype: str, gradients: bool, package: Any) -> Callable:
    function = getattr(package, case.loss.name) if package else case.loss.formula
    number = numpy_dtype(result_dtype(dtype)).type
    options = {k: number(v) if isinstance(v, float) else v for k, v in case.settings.items()}
    shape = _batch(case, case.steps[0])
    where = np.ones(shape, bool) if case.where is None else case.where
    kept = np.flatnonzero(where if where.ndim == len(shape) else where.any(-1))
    if where.ndim > len(shape):  # the mask also covers parts of examples, which the formula leaves out itself
        options["where"] = where[kept]
    above = np.broadcast_to(upstream(case, _value_shape(case)), shape).ravel()[kept]
    weights = above / max(len(kept), 1) if case.reduction == "mean" else above

    def values(inputs: dict[str, Any]) -> tuple[Any, Any]:
        if not len(kept):
            return np.zeros(0, np.longdouble), inputs.get(str(case.loss.state))
        value = function(*(inputs[k] for k in case.loss.inputs if k in inputs), **options)
        if case.loss.value == "array":
            value = list(map(weighted, value))
        return value if case.loss.state else (value, None)

    def step(inputs: dict[str, Any], state: Any) -> tuple[Any, Any, Any]:
        inputs = {**inputs, **_given(case, state)}
        dropped = {k: each_array(v, functools.partial(_examples, case, k, kept)) for k, v in inputs.items()}
        value, state = values(dropped)
        slopes: dict[str, Any] = {k: _each_leaf(inputs[k], np.zeros_like) for k in case.loss.constant if k in inputs}
        for k in case.loss.learns if gradients else ():
            gradient = _complex_step(case, dropped, k, lambda x: weights * values(x)[0])
            full = [_undrop(case, k, g, x, kept) for g, x in zip(gradient, _list(inputs[k]), strict=True)]
            slopes[k] = full if isinstance(inputs[k], list) else full[0]
        if case.reduction == "none":
            full_value = np.zeros(int(np.prod(shape)), np.longdouble)
            full_value[kept] = value
            return full_value.reshape(shape), slopes, state
        total = np.sum(np.asarray(value))
        return np.asarray(total / max(len(kept), 1) if case.reduction == "mean" else total), slopes, state

    return step


def _list(x: Any) -> list[np.ndarray]:
    return x if isinstance(x, list) else [x]


def _examples(case: Case, name: str, kept: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The kept examples, on one axis, in extended precision."""
    x = x.astype(np.longdouble) if is_float(x) else x
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


def _complex_step(
    case: Case, inputs: dict[str, Any], name: str, weighted: Callable[[dict[str, Any]], np.ndarray]
) -> list[np.ndarray]:
    """The gradient: the imaginary part of the weighted values after a tiny imaginary step of one entry at a time.

    If the value of an example does not depend on other examples, all examples take the step of an entry at once.
    """
    tiny = np.finfo(np.longdouble).tiny ** 0.25  # tiny even compared with the smallest float64 inputs
    axis = None if case.loss.batch_coupled else KINDS[case.loss.inputs[name]].axis
    arrays = _list(inputs[name])
    gradients = []
    for which, array in enumerate(arrays):
        rows = array[None] if axis is None else np.moveaxis(array, axis, 0)
        gradient = np.zeros(rows.shape, np.longdouble)
        for place in np.ndindex(rows.shape[1:]):
            moved = rows.astype(np.clongdouble)
            moved[:, *place] += 1j * tiny
            changed: list[Any] = list(arrays)
            changed[which] = moved[0] if axis is None else np.moveaxis(moved, 0, axis)
            slope = (
                np.imag(weighted({**inputs, name: changed if isinstance(inputs[name], list) else changed[0]})) / tiny
            )
            gradient[:, *place] = slope.sum() if axis is None else slope
        gradient = np.where(np.isfinite(rows), gradient, 0)
        gradients.append(gradient[0] if axis is None else np.moveaxis(gradient, 0, axis))
    return gradients
