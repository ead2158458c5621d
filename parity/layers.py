"""The layers of a Flax model and of its PyTorch port: which correspond, their inputs and outputs, and their weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from kdlosses.layers import (
    KINDS,
    TRANSPOSE_KERNEL,
    Layer,
    Weights,
    flax_kind,
    outermost,
    to_torch,
    torch_kind,
    translated,
)
from kdlosses.trees import each_leaf, is_array, leaves
from parity.arrays import is_float, to_numpy

Copy = Callable[[Any, Any], None]
# the user's own layers: the class in Flax, and the class in PyTorch with the function that copies the weights
Own = Mapping[type, tuple[type, Copy | None]]


class Call(NamedTuple):
    """A call of a layer: its input arrays, and the tree of its outputs.

    Attributes:
        averages: whether a batch norm of Flax used its running averages.
    """

    layer: Layer
    inputs: list[np.ndarray]
    output: Any
    averages: bool = False


class Pair(NamedTuple):
    """A layer of Flax, its counterpart in PyTorch, and for the user's own layers the function that copies weights."""

    ours: Layer
    theirs: Layer
    is_own: bool = False
    copy: Copy | None = None

    def __str__(self) -> str:
        return f"{self.ours}, in PyTorch {self.theirs}"

    @property
    def kind(self) -> str:
        """The class in Flax, or "" for one of the user's own layers."""
        return "" if self.is_own else _class(self.ours.module)

    def channels_last(self, x: np.ndarray, channels_first: tuple[int, ...]) -> np.ndarray:
        """An input or output of PyTorch's layer, with the order of axes that it has in Flax."""
        if self.is_own:
            return np.moveaxis(x, 1, -1) if x.ndim in channels_first else x
        if self.kind == "MultiHeadAttention":
            return x if self.theirs.module.batch_first or x.ndim < 3 else x.swapaxes(0, 1)
        if self.kind in ("Conv", "ConvTranspose"):
            return np.moveaxis(x, x.ndim - 1 - len(self.ours.module.kernel_size), -1)
        if self.kind in ("BatchNorm", "GroupNorm", "InstanceNorm") and x.ndim > 1:
            return np.moveaxis(x, 1, _feature_axis(self.ours.module))
        return x


def _class(module: Any) -> str:
    """The class of a known layer of Flax, or "" for any other."""
    return flax_kind(module).removesuffix(TRANSPOSE_KERNEL)


def _feature_axis(norm: Any) -> int:
    axis = getattr(norm, "axis", -1)
    return axis if isinstance(axis, int) else -1


def moves_channels(module: Any, x: np.ndarray) -> bool:
    """Whether an input of a layer of Flax has its channels first in PyTorch."""
    kind = _class(module)
    if kind in ("Conv", "ConvTranspose"):
        return x.ndim == len(module.kernel_size) + 2
    by_channel = kind in ("BatchNorm", "GroupNorm", "InstanceNorm")
    return by_channel and x.ndim > 2 and _feature_axis(module) % x.ndim == x.ndim - 1


def run_flax(module: Any, inputs: tuple[Any, ...], own: Own) -> tuple[Any, list[Call]]:
    """Run the module; returns the outputs, and the calls of the layers in order.

    Afterwards the running variances of the module's batch norms are those of PyTorch, which averages the sample
    variance. It is n / (n - 1) times the population variance, which Flax averages.
    """
    layers = {id(layer.module): layer for layer in flax_layers(module, own)}
    calls: list[Call] = []
    running: set[int] = set()

    def recorded(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def record(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in layers or id(self) in running:  # a subclass that calls its base class
                return call(self, *args, **kwargs)
            running.add(id(self))
            try:
                output = call(self, *args, **kwargs)
            finally:
                running.remove(id(self))
            kind = "" if isinstance(self, tuple(own)) else _class(self)
            calls.append(_call(layers[id(self)], kind, args, kwargs, output))
            return output

        return record

    with _sample_variances(), contextlib.ExitStack() as stack:
        for owner in {next(c for c in type(x.module).__mro__ if "__call__" in vars(c)) for x in layers.values()}:
            stack.enter_context(mock.patch.object(owner, "__call__", recorded(owner.__call__)))
        outputs = module(*inputs)
    return outputs, calls


@contextlib.contextmanager
def _sample_variances() -> Iterator[None]:
    import jax.numpy as jnp
    from flax import nnx

    call = nnx.BatchNorm.__call__
    norms: dict[int, tuple[Any, np.ndarray]] = {}

    @functools.wraps(call)
    def follow(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        before = np.asarray(self.var[...], np.float64)
        output = call(self, x, *args, **kwargs)
        if not _averages(self, (x, *args), kwargs):
            _, var = norms.get(id(self), (self, before))
            step = np.asarray(self.var[...], np.float64) - self.momentum * before
            count = x.size // max(before.size, 1)
            norms[id(self)] = self, self.momentum * var + step * count / max(count - 1, 1)
        return output

    with mock.patch.object(nnx.BatchNorm, "__call__", follow):
        yield
    for norm, var in norms.values():
        norm.var[...] = jnp.asarray(var, norm.var[...].dtype)


def _averages(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a batch norm of Flax uses its running averages, as the call says or, if it does not, the module."""
    asked = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    return bool(norm.use_running_average if asked is None else asked)


def run_torch(module: Any, inputs: tuple[Any, ...], own: Own) -> tuple[Any, list[Call]]:
    """Run the module; returns the outputs, and the calls of the layers in order."""
    layers = {id(layer.module): layer for layer in torch_layers(module, own)}
    kinds = tuple(theirs for theirs, _ in own.values())
    calls: list[Call] = []

    def record(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        kind = "" if isinstance(layer, kinds) else torch_kind(layer)
        output = output[0] if kind == "MultiheadAttention" else output  # its output includes the attention weights
        calls.append(_call(layers[id(layer)], kind, args, kwargs, output))

    for layer in layers.values():
        layer.module.register_forward_hook(record, with_kwargs=True)
    return module(*inputs), calls


def _call(layer: Layer, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
    """A call with copies of its arrays, because later code may change them. `kind` is "" for the user's own layers."""
    given = [x for x in leaves((args, kwargs)).values() if is_array(x)]
    if kind == "MultiHeadAttention":
        query, key, value = (_argument(args, kwargs, i, f"inputs_{x}") for i, x in enumerate("qkv"))
        key = query if key is None else key
        given = [query, key, key if value is None else value]
    elif kind == "MultiheadAttention":
        given = [_argument(args, kwargs, i, x) for i, x in enumerate(("query", "key", "value"))]
    elif kind:
        given = given[:1]
    averages = kind == "BatchNorm" and _averages(layer.module, args, kwargs)
    return Call(layer, [np.array(to_numpy(x)) for x in given], each_leaf(_copied, output), averages)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _copied(x: Any) -> Any:
    return np.array(to_numpy(x)) if is_array(x) else x


def flax_layers(module: Any, own: Own) -> list[Layer]:
    """Those of known kinds and those of the user's own, outermost."""
    from flax import nnx

    parts = ((".".join(map(str, path)), x) for path, x in nnx.iter_modules(module))
    return outermost(parts, lambda x: type(x).__name__ if isinstance(x, tuple(own)) else flax_kind(x))


def torch_layers(module: Any, own: Own) -> list[Layer]:
    """Those of known kinds and those of the user's own, outermost."""
    kinds = tuple(theirs for theirs, _ in own.values())
    return outermost(module.named_modules(), lambda x: type(x).__name__ if isinstance(x, kinds) else torch_kind(x))


def paired(ours: list[Call], theirs: list[Call], own: Own) -> list[Pair]:
    """The pairs of layers, call by call.

    Raises:
        ValueError: a call is of another kind of layer, or a layer has two counterparts.
    """
    pairs: list[Pair] = []
    for number, (our_call, their_call) in enumerate(itertools.zip_longest(ours, theirs)):
        x, y = our_call and our_call.layer, their_call and their_call.layer
        pair = _pair(x, y, own) if x and y else None
        if pair is None:
            raise ValueError(
                f"compare_modules: call {number} is of {x or 'no layer'} in Flax and of {y or 'no layer'} in PyTorch; "
                "both must call the same kinds of layers in the same order (layers inside of nnx.jit, nnx.remat, nnx.scan "
                "or nnx.vmap are not seen: compare the model without it)"
            )
        pairs.append(pair)
    for turned in (False, True):
        twins: dict[str, Layer] = {}
        for pair in pairs:
            layer, twin = (pair.theirs, pair.ours) if turned else (pair.ours, pair.theirs)
            if twins.setdefault(layer.path, twin) is not twin:
                raise ValueError(
                    f"compare_modules: {layer} is called where the other module calls {twins[layer.path]} "
                    f"and where it calls {twin}; a layer must have one counterpart"
                )
    return pairs


def uncalled(ours: Any, theirs: Any, pairs: list[Pair], own: Own) -> tuple[list[Pair], list[Layer]]:
    """The layers that are not called: pairs of the same kind at the same path in both modules, and the other layers."""
    ours_left = [x for x in flax_layers(ours, own) if x.path not in {pair.ours.path for pair in pairs}]
    theirs_left = [x for x in torch_layers(theirs, own) if x.path not in {pair.theirs.path for pair in pairs}]
    twins = [pair for x in ours_left for y in theirs_left if x.path == y.path and (pair := _pair(x, y, own))]
    paths = {pair.ours.path for pair in twins}
    return twins, [x for x in (*ours_left, *theirs_left) if x.path not in paths]


def _pair(ours: Layer, theirs: Layer, own: Own) -> Pair | None:
    for flax, (twin, copies) in own.items():
        if isinstance(ours.module, flax) and isinstance(theirs.module, twin):
            return Pair(ours, theirs, True, copies)
    kind = _class(ours.module)
    return Pair(ours, theirs) if kind and KINDS.get(torch_kind(theirs.module)) == kind else None


def in_torch(module: Any, only: Any, pairs: list[Pair]) -> dict[str, Weights]:
    """The weights of a Flax module, or their gradients, with the names and axes of PyTorch, by subject.

    Args:
        module: a module of Flax that has the layers of the pairs at their paths.
        only: a filter of Flax that selects the variables; a layer whose weights the user copies returns all of them.
        pairs: the pairs of layers, each once.
    """
    from flax import nnx

    from kdjax._pack import dotted, names_in_torch

    parts = {dotted(path): part for path, part in nnx.iter_modules(module)}
    variables = ((dotted(path), x.get_value()) for path, x in nnx.to_flat_state(nnx.state(module, only)))
    left = {name: to_numpy(x) for name, x in variables if is_array(x) and "key" not in str(x.dtype)}
    result: dict[str, Weights] = {}
    for pair in pairs:
        path = pair.ours.path
        own = {name: left.pop(name) for name in list(left) if name in pair.ours}
        own = {name.removeprefix(f"{path}."): x for name, x in own.items()}
        if pair.copy is not None:
            weights = _copied_by_user(pair, parts[path])
        elif pair.is_own:
            weights = translated(own, names_in_torch(parts[path]), to_torch, 0)
        else:
            weights = to_torch(flax_kind(parts[path]), own) if own.keys() - _CACHE else {}
        prefix = f"{pair.theirs.path}." if pair.theirs.path else ""
        result[str(pair)] = {prefix + name: x for name, x in weights.items()}
    return {**result, **{f"`{name}`": {name: x} for name, x in left.items()}}


_CACHE = {"cached_key", "cached_value", "cache_index"}  # PyTorch's attention has no such cache


def _copied_by_user(pair: Pair, layer: Any) -> Weights:
    """What the user's function writes into PyTorch's layer: all that is equal after zeros and after ones were there."""
    import torch

    assert pair.copy is not None
    written: list[Weights] = []
    for before in (0, 1):
        twin = copy.deepcopy(pair.theirs.module)
        held = [*twin.named_parameters(), *twin.named_buffers()]
        with torch.no_grad():
            for _, x in held:
                x.fill_(before)
            try:
                pair.copy(layer, twin)
            except Exception as error:
                raise RuntimeError(
                    f"compare_modules: the function that copies the weights of {pair} raised {type(error).__name__}: {error}"
                ) from error
        written.append({name: to_numpy(x).copy() for name, x in (*twin.named_parameters(), *twin.named_buffers())})
    one, other = written
    same = {name: x for name, x in one.items() if np.array_equal(x, other[name], equal_nan=is_float(x))}
    for name, _ in pair.theirs.module.named_parameters():
        if name not in same:
            raise TypeError(
                f"compare_modules: the function that copies the weights of {pair} does not set all of `{name}`"
            )
    return same


_AFFINE = ("use_bias=True and use_scale=True", "affine=True", "use_bias=False and use_scale=False", "affine=False")
_ELEMENTWISE = ("use_scale=True", "elementwise_affine=True", "use_scale=False", "elementwise_affine=False")
_BIAS = ("use_bias=True", "bias=True", "use_bias=False", "bias=False")
# the arguments in Flax and PyTorch with which a layer of this class has a weight, and those with which it has none
_ARGUMENTS = {
    **{(kind, weight): _AFFINE for kind in ("BatchNorm", "GroupNorm", "InstanceNorm") for weight in ("weight", "bias")},
    **{(kind, "weight"): _ELEMENTWISE for kind in ("LayerNorm", "RMSNorm")},
    **{(kind, "bias"): _BIAS for kind in ("Linear", "Conv", "ConvTranspose", "LayerNorm", "MultiHeadAttention")},
}


def copy_weights(
    weights: dict[str, Weights], theirs: Any, pairs: list[Pair], alone: list[Layer], settings: Mapping[str, list[str]]
) -> None:
    """Copy the weights of the Flax module into the PyTorch module.

    Args:
        weights: the weights by subject, from `in_torch`.
        theirs: the PyTorch module.
        pairs: the pairs of layers, each once.
        alone: layers of either module that are neither called nor paired.
        settings: the differing settings of pairs, by subject, which may explain a shape.

    Raises:
        TypeError: a weight without a counterpart.
        ValueError: a weight of another shape, or a tensor with two counterparts.
    """
    import torch

    given = {name: (subject, x) for subject, named in weights.items() for name, x in named.items()}
    held = dict(theirs.named_parameters(remove_duplicate=False))
    wanted = held | {k: x for k, x in theirs.named_buffers() if k.rpartition(".")[2].startswith("running_")}
    held = wanted | dict(theirs.named_buffers())
    for pair in pairs:
        if not pair.copy:
            _check_same_weights(pair, given, wanted)
    known = (
        f"known are {', '.join(KINDS)}, and parameters that have the same path on both sides; of layers of your own say "
        "layers={MyFlaxLayer: MyTorchLayer}, or layers={MyFlaxLayer: (MyTorchLayer, copy_weights)}"
    )

    def why(name: str) -> str:
        """The reason why a weight has no counterpart, if it is known."""
        if owner := next((layer for layer in alone if name in layer), None):
            return f", for {owner} is not called on these inputs"
        if pair := next((pair for pair in pairs if name in pair.theirs), None):
            return f", for {pair.ours} has no such weight of its own; if it is tied to another, tie it in both"
        return f"; {known}"

    tied = {id(x): name for name, x in reversed(held.items()) if name in given}
    for name, x in wanted.items():
        if id(x) not in tied and not any(pair.copy and name in pair.theirs for pair in pairs):
            owner = type(theirs.get_submodule(name.rpartition(".")[0])).__name__
            raise TypeError(f"compare_modules: `{name}`, of a PyTorch {owner}, has no counterpart in Flax{why(name)}")
    for name, (subject, x) in given.items():
        if name not in held:
            raise TypeError(f"compare_modules: {subject} of Flax has no counterpart `{name}` in PyTorch{why(name)}")
        target = held[name]
        if x.shape != tuple(target.shape):
            shapes = f"{list(x.shape)} from Flax, {list(target.shape)} in PyTorch"
            raise ValueError(
                "; ".join([f"compare_modules: {subject}: `{name}` is {shapes}", *settings.get(subject, [])])
            )
        first = tied[id(target)]
        if first != name and not np.array_equal(given[first][1], x):
            raise ValueError(
                f"compare_modules: `{first}` and `{name}` are one tensor in PyTorch and two arrays in Flax, of "
                f"{given[first][0]} and of {subject}; tie them in Flax too, or in neither"
            )
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.array(x, np.float64 if is_float(x) else None)))


def _check_same_weights(pair: Pair, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise an error if only one layer of a pair has an optional weight."""
    prefix = f"{pair.theirs.path}." if pair.theirs.path else ""
    lonely = [name for name in [*given, *wanted] if name in pair.theirs and (name in given) != (name in wanted)]
    for name in sorted(lonely, key=lambda name: "bias" in name):  # a weight may come with a bias
        last = name.removeprefix(prefix).replace("in_proj_bias", "bias").removeprefix("out_proj.")
        if pair.kind == "BatchNorm" and last in ("running_mean", "running_var"):
            raise TypeError(
                f"compare_modules: {pair.theirs} of PyTorch has no running statistics, and {pair.ours} of Flax has; build "
                "it with track_running_stats=True"
            )
        if (pair.kind, last) in _ARGUMENTS:
            sides = [f"{pair.ours} of Flax", f"{pair.theirs} of PyTorch"]
            having, lacking = sides if name in given else sides[::-1]
            what = "a bias" if last == "bias" else "a scale"
            ours, theirs, without_ours, without_theirs = _ARGUMENTS[pair.kind, last]
            raise TypeError(
                f"compare_modules: {having} has {what}, and {lacking} has none; build both with one ({ours} in Flax, "
                f"{theirs} in PyTorch), or both without ({without_ours} in Flax, {without_theirs} in PyTorch)"
            )
