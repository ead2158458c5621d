"""The layers of Flax and PyTorch: which of them correspond, and how their weights' names and axes are converted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdlosses.trees import Packed, reference

Weights = dict[str, np.ndarray]

# the class in PyTorch, and the class in Flax
KINDS = {
    "Linear": "Linear",
    "Conv1d": "Conv",
    "Conv2d": "Conv",
    "Conv3d": "Conv",
    "ConvTranspose1d": "ConvTranspose",
    "ConvTranspose2d": "ConvTranspose",
    "ConvTranspose3d": "ConvTranspose",
    "BatchNorm1d": "BatchNorm",
    "BatchNorm2d": "BatchNorm",
    "BatchNorm3d": "BatchNorm",
    "LayerNorm": "LayerNorm",
    "RMSNorm": "RMSNorm",
    "GroupNorm": "GroupNorm",
    "InstanceNorm1d": "InstanceNorm",
    "InstanceNorm2d": "InstanceNorm",
    "InstanceNorm3d": "InstanceNorm",
    "Embedding": "Embed",
    "MultiheadAttention": "MultiHeadAttention",
}
_IN_FLAX = frozenset(KINDS.values())


class Weight(NamedTuple):
    """A weight's name in PyTorch, and the functions that convert Flax's axes to PyTorch's and back."""

    name: str
    to_torch: Callable[[np.ndarray], np.ndarray] = np.asarray
    to_flax: Callable[[np.ndarray], np.ndarray] = np.asarray


_NORM = {"scale": Weight("weight"), "mean": Weight("running_mean"), "var": Weight("running_var")}
TRANSPOSE_KERNEL = "[transpose_kernel]"  # a suffix of Flax's class


def _window_last(kernel: np.ndarray) -> np.ndarray:
    """From `[*window, in, out]` to `[out, in, *window]`."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _window_first(weight: np.ndarray) -> np.ndarray:
    """From `[out, in, *window]` to `[*window, in, out]`."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _flipped_window_last(kernel: np.ndarray) -> np.ndarray:
    """From `[*window, in, out]` to `[in, out, *window]` with the window reversed, as in PyTorch."""
    return np.flip(np.moveaxis(kernel, (-2, -1), (0, 1)), tuple(range(2, kernel.ndim)))


def _flipped_window_first(weight: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.flip(weight, tuple(range(2, weight.ndim))), (0, 1), (-2, -1))


# by Flax's class and Flax's name of the weight; a weight that is missing here is the same in both
WEIGHTS: dict[str, dict[str, Weight]] = {
    "Linear": {"kernel": Weight("weight", np.transpose, np.transpose)},
    "Conv": {"kernel": Weight("weight", _window_last, _window_first)},
    "ConvTranspose": {"kernel": Weight("weight", _flipped_window_last, _flipped_window_first)},
    f"ConvTranspose{TRANSPOSE_KERNEL}": {"kernel": Weight("weight", _window_last, _window_first)},
    **dict.fromkeys(("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"), _NORM),
    "Embed": {"embedding": Weight("weight")},
}
ONLY_TORCH = "num_batches_tracked"  # a norm with a momentum does not use it


class Layer(NamedTuple):
    """A layer of a model: its path and its class."""

    path: str
    kind: str
    module: Any

    def __str__(self) -> str:
        return f"`{self.path}` ({self.kind})" if self.path else self.kind

    def __contains__(self, name: object) -> bool:
        return not self.path or str(name).startswith(f"{self.path}.")


def flax_kind(module: Any) -> str:
    """The class of a known layer of Flax, or "" for any other module."""
    kind = _known(module, "flax.nnx", _IN_FLAX)
    return f"{kind}{TRANSPOSE_KERNEL}" if kind and getattr(module, "transpose_kernel", False) else kind


def torch_kind(module: Any) -> str:
    """The class of a known layer of PyTorch, or "" for any other module."""
    return _known(module, "torch.nn", KINDS)


def _known(module: Any, package: str, kinds: Container[str]) -> str:
    """The first of a module's classes that the framework has: a subclass counts as the class that it extends."""
    classes = (c for c in type(module).__mro__ if c.__module__.startswith(package))
    return next((c.__name__ for c in classes if c.__name__ in kinds), "")


def outermost(modules: Iterable[tuple[str, Any]], kind: Callable[[Any], str]) -> list[Layer]:
    """The layers among the parts of a model, without those inside of another.

    Args:
        modules: all modules of the model, by path.
        kind: returns the class of a module that is a layer, and "" for any other.
    """
    layers: list[Layer] = []
    for path, module in sorted(modules, key=lambda x: x[0].count(".") if x[0] else -1):
        name = kind(module)
        if name and not any(path in layer for layer in layers):
            layers.append(Layer(path, name, module))
    return layers


def to_torch(kind: str, weights: Weights) -> Weights:
    """Convert the weights of a layer of Flax's class `kind` from Flax's names and axes to PyTorch's."""
    if kind == "MultiHeadAttention":
        return _attention(weights)
    turns = WEIGHTS.get(kind, {})
    return {turns[k].name if k in turns else k: turns[k].to_torch(x) if k in turns else x for k, x in weights.items()}


def to_flax(kind: str, weights: Weights) -> Weights:
    """Convert the weights of a layer of Flax's class `kind` from PyTorch's names and axes to Flax's."""
    if kind == "MultiHeadAttention":
        raise TypeError("PyTorch's multi-head attention does not say how its matrices are divided into Flax's heads")
    names = {turn.name: (name, turn.to_flax) for name, turn in WEIGHTS.get(kind, {}).items()}
    own = {k: x for k, x in weights.items() if k != ONLY_TORCH}
    return {names[k][0] if k in names else k: names[k][1](x) if k in names else x for k, x in own.items()}


def _attention(x: Weights) -> Weights:
    """Convert kernels `[in, heads, dim]`, and `[heads, dim, out]` of the output, to matrices; stack three."""
    three = ("query", "key", "value")
    result = {"in_proj_weight": np.concatenate([x[f"{k}.kernel"].reshape(len(x[f"{k}.kernel"]), -1).T for k in three])}
    kernel = x["out.kernel"]
    result["out_proj.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
    if "query.bias" in x:
        result["in_proj_bias"] = np.concatenate([x[f"{k}.bias"].ravel() for k in three])
        result["out_proj.bias"] = x["out.bias"]
    return result


def translated(
    weights: Weights, layers: Sequence[Sequence[str]], change: Callable[[str, Weights], Weights], to: int
) -> Weights:
    """The weights of a model under the names of the other framework.

    Args:
        weights: the weights by path.
        layers: the path in PyTorch, the path in Flax and Flax's class of each layer, or of a weight outside all layers.
        change: `to_torch` or `to_flax`.
        to: 0 for PyTorch's paths, 1 for Flax's.
    """
    result: Weights = {}
    for layer in layers:
        old, new, kind = layer[1 - to], layer[to], layer[2]
        if old in weights:
            result[new] = weights[old]
            continue
        own = {name[len(old) + 1 if old else 0 :]: x for name, x in weights.items() if name in Layer(old, kind, None)}
        result |= {f"{new}.{name}" if new else name: x for name, x in change(kind, own).items()}
    return result


def _review(w: Mapping[str, Any]) -> dict[str, Any]:
    convs = [(w[f"connectors.{i}.conv1.weight"], w[f"connectors.{i}.conv2.weight"]) for i in range(_count(w))]
    widths = {"in_channels": [x.shape[1] for x, _ in convs], "out_channels": [y.shape[0] for _, y in convs]}
    return {**widths, "mid_channels": convs[0][0].shape[0]}


def _count(w: Mapping[str, Any]) -> int:
    return len({name.split(".")[1] for name in w})


def _crcd(w: Mapping[str, Any]) -> dict[str, Any]:
    num_data, dim = w["student_memory"].shape
    embed = "linear" if "student_head.weight" in w else "nonlinear" if "student_head.0.weight" in w else "none"
    first = {"linear": "{}_head.weight", "nonlinear": "{}_head.0.weight"}.get(embed)
    widths = {f"{side}_dim": w[first.format(side)].shape[1] if first else dim for side in ("student", "teacher")}
    return {**widths, "dim": dim, "num_data": num_data, "embed": embed}


# the arguments that a module of this library was built with, from the shapes of its weights in PyTorch
BUILT_WITH: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "DINOLoss": lambda w: {"dim": len(w["center"])},
    "IBOTLoss": lambda w: {"dim": len(w["center"])},
    "DynamicCenterNormLoss": lambda w: dict(zip(("num_classes", "dim"), w["centers"].shape, strict=True)),
    "USKDLoss": lambda w: dict(zip(("num_classes", "feature_dim"), w["head.weight"].shape, strict=True)),
    "CRCDLoss": _crcd,
    "CRDLoss": _crcd,
    "ABF": lambda w: {
        "in_channels": w["conv1.weight"].shape[1],
        "mid_channels": w["conv1.weight"].shape[0],
        "out_channels": w["conv2.weight"].shape[0],
        "fuse": "attention.weight" in w,
    },
    "ReviewKD": _review,
    "VIDLoss": lambda w: {
        "in_channels": w["regressor.0.weight"].shape[1],
        "mid_channels": w["regressor.0.weight"].shape[0],
        "out_channels": len(w["log_scale"]),
    },
    "Projector": lambda w: dict(zip(("out_channels", "in_channels"), w["linear.weight"].shape, strict=True)),
}


def built_with(module: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that build a module like this one of kdjax or kdtorch, which has these weights in PyTorch."""
    name = type(module).__name__
    if name == "FunctionLoss":
        return {"function": module.function, **dict(module.options)}
    if name == "CombinedLoss":
        losses = {k: module.losses[k] for k in module.names}
        return {"losses": losses, "weights": list(module.weights), "reads": list(module.reads)}
    shapes = BUILT_WITH[name](weights)
    options = [p.name for p in inspect.signature(type(module).__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    own = ("rngs", "generator", "axis_name", "group", *shapes)  # names that only one framework has
    return {**shapes, **{k: getattr(module, k) for k in options if k not in own}}


def node(
    module: Any,
    package: str,
    packed: Callable[[Any], Packed],
    weights: Weights,
    layers: list[list[str]],
    keys: list[list[str]],
    training: bool,
) -> Packed:
    """A packed module of kdjax or kdtorch, or only the weights of any other module."""
    place = reference(type(module), package)
    arguments = packed(built_with(module, weights)) if place else None
    if type(module).__name__ == "CombinedLoss" and place:  # its losses are among its arguments
        weights, layers, keys = {}, [], []
    return {
        "module": place,
        "arguments": arguments,
        "training": training,
        "layers": layers,
        "weights": weights,
        "keys": keys,
    }
