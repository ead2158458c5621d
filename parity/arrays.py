"""NumPy arrays into either framework and back, and trees of them by the names of their leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

HALVES = ("float16", "bfloat16")


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree of dicts, lists, tuples and named tuples, by their place in it."""
    if isinstance(tree, Mapping):
        children = [(f"{path}.{key}" if path else str(key), tree[key]) for key in tree]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = [(f"{path}.{key}" if path else key, getattr(tree, key)) for key in tree._fields]
    elif isinstance(tree, list | tuple):
        children = [(f"{path}[{i}]", child) for i, child in enumerate(tree)]
    else:
        return {path: tree}
    return {place: leaf for name, child in children for place, leaf in leaves(child, name).items()}


def each_leaf(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with a function of its leaves; `None` is a leaf."""
    if isinstance(tree, Mapping):
        return {key: each_leaf(function, child) for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(each_leaf(function, child) for child in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(each_leaf(function, child) for child in tree)
    return function(tree)


def is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_float(x: Any) -> bool:
    return "float" in str(x.dtype)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest values that the dtype has; half precision is kept in float32, which holds it."""
    if not is_float(x):
        return x
    return x.astype(numpy_dtype(dtype)).astype("float32" if dtype in HALVES else dtype)


def numpy_dtype(dtype: str) -> np.dtype:
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def jax_array(x: np.ndarray, dtype: str) -> Any:
    """Floating-point numbers in `dtype`, integers in int32."""
    import jax.numpy as jnp

    return jnp.asarray(x, dtype if is_float(x) else "int32" if x.dtype.kind in "iu" else None)


def torch_tensor(x: np.ndarray, dtype: str) -> Any:
    """Floating-point numbers in `dtype`."""
    import torch

    if str(x.dtype) == "bfloat16":
        x = x.astype(np.float32)
    tensor = torch.from_numpy(np.array(x))
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


def to_numpy(x: Any) -> np.ndarray:
    """Of an array of either framework, in its own dtype."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        return x.float().numpy().astype(numpy_dtype("bfloat16")) if "bfloat16" in str(x.dtype) else x.numpy()
    return np.asarray(x)
