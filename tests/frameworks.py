"""A common interface to both packages, for tests that run in both."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import kdjax
import kdjax.nn
import kdtorch
import kdtorch.nn


@dataclasses.dataclass(frozen=True)
class Framework:
    """A framework; `array` and `numpy` convert to it and back. Maps are [batch, channels, height, width] outside."""

    name: str
    kd: Any
    array: Callable[..., Any]
    grad: Callable[..., Any]
    numpy: Callable[[Any], np.ndarray] = np.asarray
    jit: Callable[..., Any] = lambda function: function  # in JAX, because eager JAX compiles each operation separately

    def arrays(self, tree: Any, dtype: str = "float64") -> Any:
        if isinstance(tree, dict):
            return {key: self.arrays(value, dtype) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.arrays(value, dtype) for value in tree]
        return self.array(tree, dtype)


def _jax_array(x: Any, dtype: str = "float64") -> jax.Array:
    x = np.asarray(x)
    return jnp.asarray(x, dtype if x.dtype.kind == "f" else "int32" if x.dtype.kind == "i" else None)


def _torch_array(x: Any, dtype: str = "float64") -> torch.Tensor:
    x = torch.from_numpy(np.array(x))
    return x.to(getattr(torch, dtype)) if x.is_floating_point() else x


JAX = Framework("jax", kdjax, _jax_array, jax.grad, jit=jax.jit)
TORCH = Framework("torch", kdtorch, _torch_array, torch.func.grad, lambda x: x.detach().numpy())
BOTH = (JAX, TORCH)


def set_parameter(parameter: Any, value: np.ndarray) -> None:
    """Set a parameter of either framework in place, in the value's dtype."""
    if isinstance(parameter, nnx.Variable):
        parameter.set_value(jnp.asarray(value))
    else:
        parameter.data = torch.from_numpy(np.array(value))
