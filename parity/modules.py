"""A Flax model and its PyTorch port: the same outputs, and if not, from which layer on?"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from kdlosses.layers import KINDS, Layer, Weights, outermost, to_torch
from kdlosses.trees import each_leaf, leaves
from parity.arrays import is_float, jax_array, rounded, to_numpy, torch_tensor
from parity.compare import Comparison, Difference
from parity.functions import by_leaf, checked_arguments, checked_outputs, cotangent, named, precision, pulled_back

if TYPE_CHECKING:
    import torch
    from flax import nnx

_Call = tuple[Layer, Any]
_CHANNELS_FIRST = {"Conv1d": 3, "Conv2d": 4, "Conv3d": 5}


def compare_modules(
    nnx_module: nnx.Module,
    torch_module: torch.nn.Module,
    *inputs: Any,
    dtypes: Sequence[str] = ("float64", "float32"),
    limits: Mapping[str, tuple[float, float]] | None = None,
    channels_first: Sequence[int] | None = None,
    seed: int = 0,
) -> Comparison:
    """Give a PyTorch module the weights of a Flax NNX module, run both, and find the first layer that differs.

    The layers are paired in the order in which they are called: Linear, Conv, BatchNorm, LayerNorm, RMSNorm, GroupNorm,
    Embedding and multi-head attention (which JAX computes in float32 even for float64: compare it with
    `dtypes=["float32"]`); their names need not agree. A parameter outside of such a layer (a class token)
    is paired with the one of the same path and shape. Neither module is changed; each runs in the mode it is in.

    Args:
        nnx_module: takes the inputs as JAX arrays.
        torch_module: takes them as tensors.
        inputs: NumPy arrays, or trees of them, as the Flax module takes them.
        dtypes: that both modules run in.
        limits: of (value, gradient) by dtype, as in `compare`; gradients in ULP of the layer's largest.
        channels_first: the numbers of axes of the arrays, inputs and outputs, that are `[N, C, ...]` in PyTorch and
            `[N, ..., C]` in Flax; by default 4 for a module with a `Conv2d`, 3 with a `Conv1d`, 5 with a `Conv3d`.
        seed: of the cotangent of the outputs that the parameters' gradients are for.

    Returns:
        A `Comparison` with a row a layer, in the order of the calls, then the outputs; `.note` names the first that
        differs.

    Raises:
        TypeError: a layer, or a parameter, that is not known, or has no twin; the message names it.
        ValueError: the modules call other layers, or in another order, or a dropout is on.
        RuntimeError: a module raised; the message names the side and the cause.

    A port, of which the norm has PyTorch's epsilon and not Flax's:

    >>> import numpy as np, torch
    >>> from flax import nnx
    >>> from parity import compare_modules
    >>> ours = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.LayerNorm(8, rngs=nnx.Rngs(0)))
    >>> theirs = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> print(compare_modules(ours, theirs, np.ones((2, 4))).note)
    the first that differs is `layers.1` (LayerNorm), in PyTorch `1` (LayerNorm)
    >>> theirs[1].eps = 1e-6
    >>> compare_modules(ours, theirs, np.ones((2, 4))).passed
    True
    """
    import jax

    inputs, limits = checked_arguments("compare_modules", inputs, dtypes, limits)
    if channels_first is None:
        kinds = {layer.kind for layer in _torch_layers(torch_module)}
        channels_first = [axes for kind, axes in _CHANNELS_FIRST.items() if kind in kinds]
    found: list[Difference] = []
    for dtype in dtypes:
        with precision(dtype), jax.numpy_dtype_promotion("standard"):  # which Flax's batch norm needs
            found += _differences(nnx_module, torch_module, inputs, dtype, limits[dtype], channels_first, seed)
    first = next((x for x in found if not x.passed), None)
    return Comparison(tuple(found), note=f"the first that differs is {first.subject}" if first else "")


def _differences(
    nnx_module: Any,
    torch_module: Any,
    inputs: tuple[Any, ...],
    dtype: str,
    limits: tuple[float, float],
    channels_first: Sequence[int],
    seed: int,
) -> Iterator[Difference]:
    import torch
    from flax import nnx

    def first(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x, -1, 1) if x.ndim in channels_first else x

    def last(x: Any) -> Any:
        return x.movedim(1, -1) if x.ndim in channels_first else x

    inputs = each_leaf(lambda x: rounded(x, dtype), inputs)
    our_inputs = each_leaf(lambda x: jax_array(x, dtype), inputs)
    their_inputs = each_leaf(lambda x: torch_tensor(first(x), dtype), inputs)

    ours, theirs = nnx.clone(nnx_module), copy.deepcopy(torch_module).to(getattr(torch, dtype))
    state = [(path, x[...]) for path, x in nnx.to_flat_state(nnx.state(ours))]
    nnx.update(ours, nnx.from_flat_state([(path, x.astype(dtype) if is_float(x) else x) for path, x in state]))
    for _, module in nnx.iter_modules(ours):
        if getattr(module, "dtype", None) is not None:  # as an embedding, which keeps that of its first weights
            module.dtype = dtype  # type: ignore[attr-defined]
    _check_dropout(ours, theirs)

    # each run is of a copy: a module may average what it sees
    with named("JAX", ours, dtype):
        our_outputs, our_calls = _run_flax(nnx.clone(ours), our_inputs)
    with named("PyTorch", theirs, dtype):
        _, their_calls = _run_torch(copy.deepcopy(theirs), their_inputs)
    pairs = _paired(our_calls, their_calls)
    weights = _flat(nnx.state(ours, nnx.Any(nnx.Param, nnx.BatchStat)))
    _copy_weights(_translated(weights, pairs), theirs)
    their_outputs, their_calls = _run_torch(theirs, their_inputs)

    names = {(x.path, y.path): _subject(x, y) for x, y in pairs}
    where = {"case": "", "dtype": dtype}
    for (x, our_output), (y, their_output) in zip(our_calls, their_calls, strict=True):
        a, b = to_numpy(our_output), to_numpy(last(their_output))
        yield from by_leaf(a, b, limit=limits[0], part="value", subject=names[x.path, y.path], **where)
    our_outputs = checked_outputs("JAX", nnx_module, leaves(our_outputs))
    their_outputs = {k: last(x) for k, x in checked_outputs("PyTorch", torch_module, leaves(their_outputs)).items()}
    given, wanted = ({k: to_numpy(x) for k, x in side.items()} for side in (our_outputs, their_outputs))
    yield from by_leaf(given, wanted, limit=limits[0], part="value", subject="output", **where)

    above = {k: cotangent(k, x.shape, seed) for k, x in our_outputs.items() if is_float(x)}

    def objective(module: Any) -> Any:
        outputs = leaves(module(*our_inputs))
        return sum((outputs[k] * jax_array(x, dtype).astype(outputs[k].dtype)).sum() for k, x in above.items())

    parameters = dict(theirs.named_parameters())
    their_slopes = pulled_back(their_outputs, parameters, above)
    for subject, slopes in _translated(_flat(nnx.grad(objective)(ours)), pairs).items():
        wanted = {name: their_slopes[name] for name in slopes}
        scale = max(np.abs(x).max(initial=0) for x in wanted.values())  # of the bias before a norm, whose gradient is 0
        yield from by_leaf(slopes, wanted, limit=limits[1], scale=scale, part="gradient", subject=subject, **where)


def _subject(ours: Layer, theirs: Layer) -> str:
    return f"{ours}, in PyTorch {theirs}"


def _flax_layers(module: Any) -> list[Layer]:
    from flax import nnx

    return outermost(
        ((".".join(map(str, path)), x) for path, x in nnx.iter_modules(module)), "flax.nnx", KINDS.values()
    )


def _torch_layers(module: Any) -> list[Layer]:
    return outermost(module.named_modules(), "torch.nn", KINDS)


def _run_flax(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, list[_Call]]:
    """The outputs, and those of every layer in the order of the calls."""
    layers = {id(layer.module): layer for layer in _flax_layers(module)}
    calls: list[_Call] = []

    def recorded(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def record(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(self, *args, **kwargs)
            if id(self) in layers:
                calls.append((layers[id(self)], output))
            return output

        return record

    with contextlib.ExitStack() as stack:
        for owner in {next(c for c in type(x.module).__mro__ if "__call__" in vars(c)) for x in layers.values()}:
            stack.enter_context(mock.patch.object(owner, "__call__", recorded(owner.__call__)))
        outputs = module(*inputs)
    return outputs, calls


def _run_torch(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, list[_Call]]:
    calls: list[_Call] = []
    for layer in _torch_layers(module):

        def record(_module: Any, _inputs: Any, output: Any, layer: Layer = layer) -> None:
            calls.append((layer, output[0] if isinstance(output, tuple) else output))  # attention gives its weights too

        layer.module.register_forward_hook(record)
    return module(*inputs), calls


def _paired(ours: list[_Call], theirs: list[_Call]) -> list[tuple[Layer, Layer]]:
    pairs: dict[tuple[str, str], tuple[Layer, Layer]] = {}
    for number, (our_call, their_call) in enumerate(itertools.zip_longest(ours, theirs)):
        x, y = our_call and our_call[0], their_call and their_call[0]
        if not (x and y) or KINDS[y.kind] != x.kind:
            raise ValueError(
                f"compare_modules: call {number} is of {x or 'no layer'} in Flax and of {y or 'no layer'} in PyTorch; "
                "both must call the same kinds of layers in the same order"
            )
        pairs[x.path, y.path] = x, y
    for side, other in ((0, 1), (1, 0)):
        twins: dict[str, Layer] = {}
        for pair in pairs.values():
            if twins.setdefault(pair[side].path, pair[other]) is not pair[other]:
                raise ValueError(
                    f"compare_modules: {pair[side]} is called where the other module calls {twins[pair[side].path]} "
                    f"and where it calls {pair[other]}; a layer must have one twin"
                )
    return list(pairs.values())


def _flat(state: Any) -> Weights:
    from flax import nnx

    return {".".join(map(str, path)): to_numpy(x[...]) for path, x in nnx.to_flat_state(state)}


def _translated(weights: Weights, pairs: list[tuple[Layer, Layer]]) -> dict[str, Weights]:
    """Flax's weights, or their gradients, under PyTorch's names and in its layout, by subject."""
    result: dict[str, Weights] = {}
    left = dict(weights)
    for ours, theirs in pairs:
        own = {name: left.pop(name) for name in weights if name in ours}
        own = {name.removeprefix(f"{ours.path}."): x for name, x in own.items()}
        prefix = f"{theirs.path}." if theirs.path else ""
        result[_subject(ours, theirs)] = {prefix + name: x for name, x in to_torch(ours.kind, own).items()}
    return {**result, **{f"`{name}`": {name: x} for name, x in left.items()}}


def _copy_weights(weights: dict[str, Weights], module: Any) -> None:
    import torch

    given = {name: (subject, x) for subject, own in weights.items() for name, x in own.items()}
    wanted = dict(module.named_parameters()) | {
        k: v for k, v in module.named_buffers() if k.split(".")[-1].startswith("running_")
    }
    known = f"known are {', '.join(KINDS)}, and parameters that have the same path on both sides"
    for name in wanted.keys() - given.keys():
        owner = module.get_submodule(name.rpartition(".")[0])
        raise TypeError(f"compare_modules: `{name}`, of a PyTorch {type(owner).__name__}, has no twin in Flax; {known}")
    for name, (subject, x) in given.items():
        if name not in wanted:
            raise TypeError(f"compare_modules: {subject} of Flax has no twin `{name}` in PyTorch; {known}")
        if x.shape != tuple(wanted[name].shape):
            shapes = f"{list(x.shape)} from Flax, {list(wanted[name].shape)} in PyTorch"
            raise ValueError(f"compare_modules: {subject}: `{name}` is {shapes}")
        with torch.no_grad():
            wanted[name].copy_(torch_tensor(x, str(x.dtype)))


def _check_dropout(ours: Any, theirs: Any) -> None:
    from flax import nnx

    on = [f"`{path}` of PyTorch" for path, x in theirs.named_modules() if x.training and _rate(x, "p", "dropout")]
    on += [
        f"`{'.'.join(map(str, path))}` of Flax"
        for path, x in nnx.iter_modules(ours)
        if not getattr(x, "deterministic", True) and _rate(x, "rate", "dropout_rate")
    ]
    if on:
        raise ValueError(f"compare_modules: {on[0]} drops at random: call .eval() on both modules first")


def _rate(module: Any, *names: str) -> float:
    return next((rate for rate in (getattr(module, name, None) for name in names) if isinstance(rate, float)), 0.0)
