"""The types that public functions take, and the check of their arguments."""

from __future__ import annotations

import functools
import numbers
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer

from kdlosses import checks

__all__ = ["Array", "AxisName", "Bool", "Float", "Integer", "Reduction", "Scalar", "checked", "describe"]

if TYPE_CHECKING:
    Array = jax.Array
    Number = float
else:  # NumPy's arrays and numbers are accepted too, as by JAX's own functions
    Array = jax.Array | np.ndarray
    Number = numbers.Real
Reduction = Literal["mean", "sum", "none"]
Scalar = Number | Array
AxisName = str | tuple[str, ...]

_CHECK = os.environ.get("KDLOSSES_CHECK") != "0"
_F = TypeVar("_F", bound=Callable[..., Any])


def _smallest(x: Any) -> int | None:
    return None if isinstance(x, jax.core.Tracer) or not x.size else int(x.min())


def _device(x: Any) -> str | None:
    if isinstance(x, jax.core.Tracer | np.ndarray) or not x.committed or len(x.devices()) > 1:
        return None
    return str(x.device)


_JAX = checks.Framework(
    arrays=(jax.Array, np.ndarray),
    foreign={"torch": "give kdjax jnp.from_dlpack(x.detach())"},
    sizes=lambda x: x.shape,
    smallest=_smallest,
    device=_device,
)
describe = functools.partial(checks.describe, arrays=_JAX.arrays)


def checked(function: _F) -> _F:
    """Check every argument against its annotation, one after another, and replace an `nnx.Variable` by its array.

    Under `jit` this costs nothing. With the environment variable `KDLOSSES_CHECK=0` at import there is no check.
    """
    plan, types = checks.read(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(_array, args)), {name: _array(value) for name, value in kwargs.items()}
        if _CHECK:
            checks.check(plan, types, _JAX, args, kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def _array(value: Any) -> Any:
    """The array that a Variable of Flax holds, also inside a list or a state."""
    nnx = sys.modules.get("flax.nnx")  # a Variable exists only if flax is imported
    if nnx is None or isinstance(value, jax.Array):
        return value
    if isinstance(value, nnx.Variable):
        return value[...]
    if isinstance(value, list | tuple) and any(isinstance(x, nnx.Variable) for x in value):
        items = list(map(_array, value))
        return type(value)(*items) if hasattr(value, "_fields") else items
    return value
