"""Converts a tree of JAX to plain containers of NumPy arrays and back, and a tensor to an array of JAX.

This is JAX's side of the conversion. The `interop` of both packages imports it, and it imports no other framework.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdlosses import layers
from kdlosses.trees import Packed, no_leaf, numpy_dtype, pack, resolve, unpack

if TYPE_CHECKING:
    import torch


def packed(tree: Any) -> Packed:
    """The tree of JAX as containers of NumPy arrays."""
    return pack(tree, "kdjax", _packed_leaf)


def _packed_leaf(path: str, x: Any) -> Packed:
    if isinstance(x, nnx.Module):
        return _packed_module(x)
    if isinstance(x, np.ndarray | np.generic) or (isinstance(x, jax.Array) and not _is_key(x)):
        return np.asarray(x)
    raise no_leaf(path, x)


def _packed_module(module: nnx.Module) -> Packed:
    table, weights, keys = names_in_torch(module), {}, []
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState))):
        name, value = dotted(path), variable[...]
        weights[name] = np.asarray(jax.random.key_data(value) if _is_key(value) else value)
        if _is_key(value):
            keys.append([next(row[0] for row in table if row[1] == name), str(jax.random.key_impl(value))])
    training = not any(getattr(part, "use_running_average", False) for _, part in nnx.iter_modules(module))
    return layers.node(
        module, "kdjax", packed, layers.translated(weights, table, layers.to_torch, 0), table, keys, training
    )


def names_in_torch(module: nnx.Module) -> list[list[str]]:
    """All layers, and all weights outside layers: the path in PyTorch, the path in Flax, and the class in Flax."""
    parts = dict(nnx.iter_modules(module))

    def in_torch(path: tuple[Any, ...]) -> str:
        """The path without the `layers` of an `nnx.Sequential`, whose entries are numbers in PyTorch."""
        inside = [step == "layers" and isinstance(parts.get(path[:i]), nnx.Sequential) for i, step in enumerate(path)]
        return dotted(step for step, left_out in zip(path, inside, strict=True) if not left_out)

    paths = {dotted(path): path for path in parts}
    found = layers.outermost(((name, parts[path]) for name, path in paths.items()), layers.flax_kind)
    table = [[in_torch(paths[x.path]), x.path, x.kind] for x in found]
    weights = [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))]
    return table + [[in_torch(x), dotted(x), ""] for x in weights if not any(dotted(x) in layer for layer in found)]


def dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def unpacked(node: Packed) -> Any:
    """The tree of JAX that was packed."""
    return unpack(node, "kdjax", lambda x: _array("", x), _unpacked_module)


def _unpacked_module(node: Packed) -> Any:
    """The module that was packed, or only its weights if its class is not one of this library."""
    weights = layers.translated(node["weights"], node["layers"], layers.to_flax, 1)
    keys = dict(node["keys"])
    state = {}
    for name, x in weights.items():
        if name in keys:
            state[name] = jax.random.wrap_key_data(jnp.asarray(x), impl=keys[name])
        elif name.rpartition(".")[2] == "generator":
            state[name.removesuffix("generator") + "key"] = jax.random.key(zlib.crc32(x.tobytes()))
        else:
            state[name] = _array(name, x)
    paths = [(tuple(int(k) if k.isdecimal() else k for k in name.split(".")), x) for name, x in state.items()]
    new = nnx.from_flat_state(paths)
    if node["module"] is None:
        return new
    kind, arguments = resolve(node["module"], "kdjax"), unpacked(node["arguments"])
    seeded = {"rngs": nnx.Rngs(0)} if "rngs" in kind.__init__.__annotations__ else {}
    built = kind(**arguments, **seeded)
    nnx.update(built, new)
    if not node["training"]:
        built.eval()
    return built


def _array(name: str, x: np.ndarray) -> jax.Array:
    """An array of the same dtype; integers that fit into 32 bits may become 32-bit integers."""
    with contextlib.suppress(OverflowError):
        y = jnp.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
        if y.dtype == x.dtype or (x.dtype.kind in "iu" and (np.asarray(y) == x).all()):
            return y
    raise _too_wide("", name, x.dtype)


def array(function: str, x: torch.Tensor) -> jax.Array:
    """A tensor as an array of JAX, without a copy if the tensor is dense in memory."""
    x = _dense(x.detach().resolve_conj().resolve_neg())
    try:
        jax_dtype(function, x)
        return jax.dlpack.from_dlpack(x)
    except ValueError:
        raise
    except Exception as error:
        raise TypeError(
            f"{function}: a tensor of dtype {x.dtype} cannot be converted to JAX, because DLPack has no such dtype there; "
            "cast it first, as by x.float()"
        ) from error


def _dense(x: torch.Tensor) -> torch.Tensor:
    """A tensor that is dense in memory, with any order of its axes, because JAX accepts no other."""
    order = sorted(range(x.ndim), key=lambda axis: -x.stride()[axis])
    return x if x.permute(order).is_contiguous() else x.contiguous()


def jax_dtype(function: str, x: torch.Tensor) -> np.dtype:
    """The dtype that a tensor has in JAX, whose integers may be narrower."""
    dtype = numpy_dtype(str(x.dtype).removeprefix("torch."))
    canonical = jax.dtypes.canonicalize_dtype(dtype)
    if canonical != dtype and dtype.kind not in "iu":
        raise _too_wide(function, "", x.dtype)
    return canonical


def _too_wide(function: str, name: str, dtype: Any) -> ValueError:
    where = ": ".join(x for x in (function, name and f"`{name}`") if x)
    return ValueError(
        f"{where or 'an array'} is {str(dtype).removeprefix('torch.')}, and JAX has 32 bits; "
        'call jax.config.update("jax_enable_x64", True), or make it 32 bits wide first'
    )


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
