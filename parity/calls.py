"""The functions that the checks call: each row's function as a loss with one value per example, whatever it returns."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.kinds import KINDS
from parity.row import Loss


def per_example(package: Any, loss: Loss) -> Callable[..., Any]:
    """A row's function in a package, with `where`, `reduction` and `axis_name` or `group` even if it has none.

    If the function returns one value for the batch, each kept example gets this value. If it returns an array, the
    value of an example is the sum of its finite entries, weighted by position. If its mask also has axes of an example,
    a mask without them keeps or leaves out whole examples.
    """
    function = loss.of(package)
    if masked_axes(loss):
        return _of_whole_examples(function, masked_axes(loss))
    return function if loss.value == "example" else _per_example(function, loss.value)


def masked_axes(loss: Loss) -> int:
    """The number of axes of an example that a mask has, in addition to the axis of the examples."""
    return max(KINDS[kind].masked for kind in loss.inputs.values())


def weighted(row: Any) -> Any:
    """The value of an example for which the function returns an array, in NumPy."""
    finite = np.isfinite(np.real(row))
    return np.sum(np.where(finite, row, 0) * np.cos(np.arange(len(row)) + 1.0))


@functools.cache
def _of_whole_examples(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    name = next(iter(inspect.signature(function).parameters))

    def masked(*inputs: Any, where: Any = None, **options: Any) -> Any:
        if where is not None and where.ndim == 1:
            shape = (inputs[0] if inputs else options[name]).shape[: 1 + axes]
            where = where.reshape(-1, *[1] * axes)
            where = where.expand(shape) if hasattr(where, "expand") else _broadcast(where, shape)
        return function(*inputs, where=where, **options)

    return masked


def _broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    return importlib.import_module("jax.numpy").broadcast_to(x, shape)


@functools.cache
def _per_example(function: Callable[..., Any], value: str) -> Callable[..., Any]:
    torch = "torch" in inspect.unwrap(getattr(function, "func", function)).__globals__
    numpy = importlib.import_module("torch" if torch else "jax.numpy")
    helpers = importlib.import_module("kdtorch._reduce" if torch else "kdjax._reduce")
    parameters = inspect.signature(function).parameters
    names = [name for name, x in parameters.items() if x.kind is not x.KEYWORD_ONLY]
    own = [name for name in ("where", "axis_name", "group") if name in parameters]

    def of_batch(*inputs: Any, where: Any = None, reduction: str = "mean", **options: Any) -> Any:
        if reduction != "none":
            return function(*inputs, where=where, reduction=reduction, **options)
        first = inputs[0] if inputs else options[names[0]]
        whole = function(*inputs, where=where, **options)
        return helpers.zero_masked(where, whole * numpy.ones_like(first[..., 0], dtype=whole.dtype))[0]

    def of_array(*inputs: Any, where: Any = None, reduction: str = "mean", **options: Any) -> Any:
        arrays = {**dict(zip(names, inputs, strict=False)), **{k: options.pop(k) for k in names if k in options}}
        devices = {k: options.get(k) for k in ("axis_name", "group") if k in options}
        if "where" in own:
            options["where"] = where
        else:
            arrays = dict(zip(arrays, helpers.zero_masked(where, *arrays.values()), strict=True))
        result = function(**arrays, **{k: v for k, v in options.items() if k in own or k not in devices})
        place = numpy.arange(result.shape[-1], **({"device": result.device} if torch else {}))
        place = place.to(result.dtype) if torch else place.astype(result.dtype)
        weight = numpy.cos(place + 1.0).reshape((1,) * (result.ndim - 1) + (-1,))
        entries = numpy.where(numpy.isneginf(result), 0, result)
        return helpers.reduce((weight * entries).sum(-1), where, reduction, *devices.values())

    return of_batch if value == "batch" else of_array
