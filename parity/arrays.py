"""Converts NumPy arrays to either framework and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kdlosses.trees import numpy_dtype

HALVES = ("float16", "bfloat16")


def is_float(x: Any) -> bool:
    return "float" in str(x.dtype)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest values in the dtype; half precision is stored in float32, which can represent it."""
    if not is_float(x):
        return x
    return x.astype(numpy_dtype(dtype)).astype("float32" if dtype in HALVES else dtype)


def jax_array(x: np.ndarray, dtype: str) -> Any:
    """An array of JAX: floating-point numbers in `dtype`, integers in int32."""
    import jax.numpy as jnp

    return jnp.asarray(x, dtype if is_float(x) else "int32" if x.dtype.kind in "iu" else None)


def torch_tensor(x: np.ndarray, dtype: str) -> Any:
    """A tensor, with floating-point numbers in `dtype`."""
    import torch

    if str(x.dtype) == "bfloat16":
        x = x.astype(np.float32)
    tensor = torch.from_numpy(np.array(x))
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


def to_numpy(x: Any) -> np.ndarray:
    """The NumPy array of an array of either framework, in its own dtype."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        return x.float().numpy().astype(numpy_dtype("bfloat16")) if "bfloat16" in str(x.dtype) else x.numpy()
    return np.asarray(x)


def each_array(x: Any, function: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Apply a function to each array in dictionaries and lists."""
    if isinstance(x, dict):
        return {key: each_array(value, function) for key, value in x.items()}
    if isinstance(x, list):
        return [each_array(value, function) for value in x]
    return function(np.asarray(x))
