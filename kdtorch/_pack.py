"""Converts a tree of PyTorch to plain containers of NumPy arrays and back.

This is PyTorch's side of the conversion. The `interop` of both packages imports it, and it imports no other framework.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlosses import layers
from kdlosses.trees import Packed, no_leaf, numpy_dtype, pack, resolve, unpack


def packed(tree: Any) -> Packed:
    """The tree of PyTorch as containers of NumPy arrays."""
    return pack(tree, "kdtorch", _packed_leaf)


def _packed_leaf(path: str, x: Any) -> Packed:
    if isinstance(x, nn.Module):
        return _packed_module(x)
    if isinstance(x, Tensor):
        if x.requires_grad:
            raise ValueError(
                f"`{path or 'tree'}` requires a gradient, but no gradient flows through this function; give x.detach()"
            )
        return numpy(x)
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x)
    raise no_leaf(path, x)


def _packed_module(module: nn.Module) -> Packed:
    parts = dict(module.named_modules())

    def in_flax(path: str) -> str:
        """The path with the `layers` of an `nnx.Sequential` before the numbers of its entries."""
        steps = path.split(".")
        for i in reversed(range(len(steps))):
            if isinstance(parts.get(".".join(steps[:i])), nn.Sequential):
                steps.insert(i, "layers")
        return ".".join(steps)

    found = layers.outermost(parts.items(), layers.torch_kind)
    table = [[x.path, in_flax(x.path) if x.path else "", layers.KINDS[x.kind]] for x in found]
    weights = {name: numpy(x) for name, x in module.state_dict().items()}
    for path, part in parts.items():
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            weights[f"{path}.generator" if path else "generator"] = numpy(generator.get_state())
    table += [[name, in_flax(name), ""] for name in weights if not any(name in layer for layer in found)]
    return layers.node(module, "kdtorch", packed, weights, table, [], module.training)


def unpacked(node: Packed) -> Any:
    """The tree of PyTorch that was packed."""
    return unpack(node, "kdtorch", tensor, _unpacked_module)


def _unpacked_module(node: Packed) -> Any:
    """The module that was packed, or only its weights if its class is not one of this library."""
    weights = {name: tensor(x) for name, x in node["weights"].items()}
    keys = [weights.pop(name) for name, _ in node["keys"]]
    drawn = [weights.pop(name) for name in list(weights) if name.rpartition(".")[2] == "generator"]
    if node["module"] is None:
        return weights
    kind, arguments = resolve(node["module"], "kdtorch"), unpacked(node["arguments"])
    if keys or drawn:
        arguments["generator"] = torch.Generator()
    built = kind(**arguments)
    built.load_state_dict(built.state_dict() | weights, assign=True)
    for state in drawn:
        built.generator.set_state(state)
    for key in keys:
        built.generator.manual_seed(zlib.crc32(numpy(key).tobytes()))
    return built.train(node["training"])


def tensor(x: np.ndarray) -> Tensor:
    """A copy in the array's dtype, which NumPy may not know."""
    dtype = getattr(torch, "bool" if x.dtype == bool else x.dtype.name, None)
    if dtype is None:
        raise TypeError(f"an array of dtype {x.dtype}, which PyTorch does not have; cast it first")
    return (
        torch.frombuffer(bytearray(x.tobytes()), dtype=dtype).reshape(x.shape)
        if x.size
        else torch.empty(x.shape, dtype=dtype)
    )


def numpy(x: Tensor) -> np.ndarray:
    """A copy in the tensor's dtype, which NumPy may not know."""
    x = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = x.reshape(-1).view(torch.uint8).numpy()
    return flat.copy().view(numpy_dtype(str(x.dtype).removeprefix("torch."))).reshape(x.shape)
