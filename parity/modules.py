"""Compares a Flax model with its PyTorch port, and finds the first layer that differs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlosses.trees import each_leaf, is_array, leaves
from parity.arrays import is_float, jax_array, rounded, to_numpy, torch_tensor
from parity.compare import Comparison, Difference
from parity.functions import by_leaf, checked_arguments, checked_outputs, cotangent, named, precision, pulled_back
from parity.layers import (
    Call,
    Copy,
    Own,
    Pair,
    copy_weights,
    in_torch,
    moves_channels,
    paired,
    run_flax,
    run_torch,
    uncalled,
)
from parity.settings import shown, unseen

if TYPE_CHECKING:
    import torch
    from flax import nnx


def compare_modules(
    nnx_module: nnx.Module,
    torch_module: torch.nn.Module,
    *inputs: Any,
    dtypes: Sequence[str] = ("float64", "float32"),
    limits: Mapping[str, tuple[float, float]] | None = None,
    channels_first: Sequence[int] | None = None,
    layers: Mapping[type, type | tuple[type, Copy]] | None = None,
    seed: int = 0,
) -> Comparison:
    """Give a PyTorch module the weights of a Flax NNX module, run both, and find the first layer that differs.

    The layers are paired in the order in which they are called: Linear, Conv, ConvTranspose, BatchNorm, LayerNorm,
    RMSNorm, GroupNorm, InstanceNorm, Embedding and multi-head attention (which JAX computes in float32 even for
    float64: compare it with `dtypes=["float32"]`), and those of `layers`; their names need not agree. A parameter
    outside such a layer (a class token) is paired with the one of the same path and shape. The comparison covers the
    output of each layer, its settings, the gradients of its parameters, and the state of the modules after the run. In
    training mode the running mean and variance have been updated; the comparison takes into account that PyTorch's
    momentum is 1 − Flax's, and that PyTorch averages the variance of a sample and Flax that of the population. Any
    other variable of Flax is compared with the buffer of the same path and shape, if there is one. Neither module is
    changed; each runs in its current mode.

    Args:
        nnx_module: takes the inputs as JAX arrays.
        torch_module: takes them as tensors.
        inputs: NumPy arrays, or trees of them, as the Flax module takes them.
        dtypes: the dtypes that both modules run in, a list of names.
        limits: of (value, gradient) by dtype, as in `compare`; gradients in ULP of the layer's largest.
        channels_first: the numbers of axes of the arrays, inputs and outputs of the modules, that are `[N, C, ...]` in
            PyTorch and `[N, ..., C]` in Flax; by default those of the inputs of convolutions, poolings and norms over
            channels.
        layers: your own layers: `{MyFlaxLayer: MyTorchLayer}` if their weights have the same names (apart from those of
            known layers inside them), otherwise `{MyFlaxLayer: (MyTorchLayer, copy_weights)}`, where
            `copy_weights(flax_layer, torch_layer)` copies the weights of the first into the second. It is called a
            second time with gradients instead of weights, so it may only permute, reshape and scale them.
        seed: of the cotangent of the outputs, for the gradients of the parameters.

    Returns:
        A `Comparison` with one row per layer, in the order of the calls, and then the outputs. `.note` names the first
        difference: a layer, or the computation between two layers if the input of the second differs already.

    Raises:
        TypeError: an argument of another kind; a layer or a parameter that is not known or has no counterpart; the
            message names it.
        ValueError: the modules call different layers, or in a different order, a weight has a different shape, or a
            dropout is on.
        RuntimeError: a module raised; the message names the side and the cause.

    A port whose norm has PyTorch's epsilon instead of Flax's:

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

    own = _checked(nnx_module, torch_module, layers)
    inputs, limits = checked_arguments("compare_modules", inputs, dtypes, limits)
    found: list[Difference] = []
    for dtype in dtypes:
        with precision(dtype), jax.numpy_dtype_promotion("standard"):  # Flax's batch norm needs it
            found += _differences(nnx_module, torch_module, inputs, dtype, limits[dtype], channels_first, own, seed)
    first = next((x for x in found if not x.passed), None)
    part = {"gradient": "the gradient of ", "state": "the state of "}.get(first.part, "") if first else ""
    return Comparison(tuple(found), note=f"the first that differs is {part}{first.subject}" if first else "")


def _checked(nnx_module: Any, torch_module: Any, layers: Mapping[type, Any] | None) -> Own:
    """Check the arguments; returns the user's own layers.

    Raises:
        TypeError: an argument of another kind.
    """
    import torch
    from flax import nnx

    name = "compare_modules"
    if isinstance(nnx_module, torch.nn.Module) and isinstance(torch_module, nnx.Module):
        raise TypeError(
            f"{name}: the Flax module comes first and the PyTorch module second, and they were given the other way round"
        )
    for argument, x, kind, called in (
        ("nnx_module", nnx_module, nnx.Module, "an nnx.Module"),
        ("torch_module", torch_module, torch.nn.Module, "a torch.nn.Module"),
    ):
        if not isinstance(x, kind):
            raise TypeError(f"{name}: `{argument}` must be {called}, got {_described(x)}")
    own = {}
    for ours, twin in dict(layers or {}).items():
        theirs, copies = twin if isinstance(twin, tuple) and len(twin) == 2 else (twin, None)
        fits = isinstance(ours, type) and issubclass(ours, nnx.Module)
        fits = fits and isinstance(theirs, type) and issubclass(theirs, torch.nn.Module)
        if not fits or not (copies is None or callable(copies)):
            raise TypeError(
                f"{name}: `layers` must be {{MyFlaxLayer: MyTorchLayer}} or {{MyFlaxLayer: (MyTorchLayer, copy_weights)}}, "
                f"of classes and a function of a layer of each, got {{{_brief(ours)}: {_brief(twin)}}}"
            )
        own[ours] = (theirs, copies)
    return own


def _described(x: Any) -> str:
    """A description of what was given for a module, and what to write instead."""
    kind = x if isinstance(x, type) else type(x)
    bases = {c.__module__.partition(".")[0] for c in kind.__mro__}
    if isinstance(x, type):
        return f"the class {x.__name__}; give a module that is built of it"
    if any(c.__module__.startswith("flax.linen") for c in kind.__mro__):
        return (
            f"{kind.__name__}, a Linen module; write the model with flax.nnx, or compare its outputs alone: "
            "parity.compare(lambda x: model.apply(variables, x), torch_module, x)"
        )
    if "torch" in bases:
        return f"{kind.__name__}, a PyTorch module"
    if "flax" in bases:
        return f"{kind.__name__}, a Flax module"
    return f"a {kind.__name__}; for functions there is parity.compare" if callable(x) else kind.__name__


def _brief(x: Any) -> str:
    return f"({', '.join(map(_brief, x))})" if isinstance(x, tuple) else getattr(x, "__name__", repr(x))


def _differences(
    nnx_module: Any,
    torch_module: Any,
    inputs: tuple[Any, ...],
    dtype: str,
    limits: tuple[float, float],
    channels_first: Sequence[int] | None,
    own: Own,
    seed: int,
) -> Iterator[Difference]:
    import torch
    from flax import nnx

    inputs = each_leaf(lambda x: rounded(x, dtype), inputs)
    our_inputs = each_leaf(lambda x: jax_array(x, dtype), inputs)
    ours, theirs = nnx.clone(nnx_module), copy.deepcopy(torch_module).to(getattr(torch, dtype))
    state = [(path, x[...]) for path, x in nnx.to_flat_state(nnx.state(ours))]
    nnx.update(ours, nnx.from_flat_state([(path, x.astype(dtype) if is_float(x) else x) for path, x in state]))
    for _, module in nnx.iter_modules(ours):
        if getattr(module, "dtype", None) is not None:  # such as an embedding, which keeps its first dtype
            module.dtype = dtype  # type: ignore[attr-defined]
    _check_dropout(ours, theirs)

    # each run uses a copy, because a module may update running averages
    ours_afterwards = nnx.clone(ours)
    with named("JAX", ours, dtype):
        our_outputs, our_calls = run_flax(ours_afterwards, our_inputs, own)
    turned = tuple(_channels_first(ours, theirs, our_calls) if channels_first is None else channels_first)
    # contiguous, because PyTorch's backward pass of a group norm fails with other strides
    first = each_leaf(lambda x: np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim in turned else x, inputs)
    their_inputs = each_leaf(lambda x: torch_tensor(x, dtype), first)
    given = f"arrays of {' and '.join(map(str, turned))} axes as [N, C, ...]" if turned else "its arrays as they are"
    with named("PyTorch", theirs, dtype, f" (it was given {given}: see `channels_first`)"):
        _, their_calls = run_torch(copy.deepcopy(theirs), their_inputs, own)
    pairs = paired(our_calls, their_calls, own)
    explained = {str(pair): [*shown(pair, call)] for call, pair in zip(our_calls, pairs, strict=True)}
    twins, alone = uncalled(ours, theirs, pairs, own)
    every = [*dict.fromkeys(pairs), *twins]
    copy_weights(in_torch(ours, nnx.Any(nnx.Param, nnx.BatchStat), every), theirs, every, alone, explained)
    _check_repeatable(theirs, their_inputs)
    their_outputs, their_calls = run_torch(theirs, their_inputs, own)

    our_outputs = checked_outputs("JAX", nnx_module, leaves(our_outputs))
    their_outputs = {
        name: x.movedim(1, -1) if x.ndim in turned else x
        for name, x in checked_outputs("PyTorch", torch_module, leaves(their_outputs)).items()
    }
    calls = zip(our_calls, their_calls, pairs, strict=True)
    where = {"case": "", "dtype": dtype}
    yield from _values([*calls], inputs, our_outputs, their_outputs, turned, limit=limits[0], **where)
    yield from _states(ours_afterwards, theirs, every, limit=limits[0], **where)

    above = {k: cotangent(k, x.shape, seed) for k, x in our_outputs.items() if is_float(x)}

    def objective(module: Any) -> Any:
        outputs = leaves(module(*our_inputs))
        return sum((outputs[k] * jax_array(x, dtype).astype(outputs[k].dtype)).sum() for k, x in above.items())

    their_slopes = pulled_back(their_outputs, dict(theirs.named_parameters()), above)
    nnx.update(ours, nnx.grad(objective)(nnx.clone(ours)))
    for subject, ours_of_it in in_torch(ours, nnx.Param, every).items():
        slopes = {name: x for name, x in ours_of_it.items() if name in their_slopes}
        wanted = {name: their_slopes[name] for name in slopes}
        scale = max((np.abs(x).max(initial=0) for x in wanted.values()), default=0)  # 0 for a bias before a norm
        yield from by_leaf(slopes, wanted, limit=limits[1], scale=scale, part="gradient", subject=subject, **where)


def _values(
    calls: list[tuple[Call, Call, Pair]],
    inputs: tuple[Any, ...],
    our_outputs: Mapping[str, Any],
    their_outputs: Mapping[str, Any],
    turned: tuple[int, ...],
    **where: Any,
) -> Iterator[Difference]:
    """Compare the outputs of each layer and of the modules, and the settings that may explain a difference.

    If the inputs of the first layer that differs are different already, the fault is before the layer.
    """
    value: Any = {**where, "part": "value"}
    wrong: Any = {**where, "part": "setting", "one": "jax", "other": "torch", "ulp": math.inf}
    agreed, before, largest = True, "the inputs", _largest(inputs)
    seen = set()

    def into(what: Any, ours: Any, theirs: Any) -> Iterator[Difference]:
        subject = f"what is computed between {before} and {what}"
        return (x for x in by_leaf(ours, theirs, subject=subject, scale=largest, **value) if not x.passed)

    for ours, theirs, pair in calls:
        subject = str(pair)
        output = {name: pair.channels_last(x, turned) for name, x in leaves(theirs.output).items() if is_array(x)}
        found = [*by_leaf(leaves(ours.output), output, subject=subject, **value)]
        settings = [] if subject in seen else [*unseen(pair, ours, where["dtype"])]
        seen.add(subject)
        if not all(x.passed for x in found):
            given = [pair.channels_last(x, turned) for x in theirs.inputs]
            if agreed and len(given) == len(ours.inputs):
                yield from into(pair, *((x if len(x) > 1 else x[0]) for x in (ours.inputs, given)))
            settings += shown(pair, ours)
        yield from (Difference(subject=subject, problem=x, **wrong) for x in settings)
        yield from found
        agreed = agreed and not settings and all(x.passed for x in found)
        before, largest = f"{pair},", max(_largest(ours.output), _largest(inputs))
    sides = [{name: to_numpy(x) for name, x in side.items()} for side in (our_outputs, their_outputs)]
    if agreed:
        yield from into("the output", *sides)
    yield from by_leaf(*sides, subject="output", **value)


def _largest(tree: Any) -> float:
    return max(
        (float(np.abs(x).max(initial=0)) for x in leaves(tree).values() if is_array(x) and is_float(x)), default=0
    )


def _states(ours: Any, theirs: Any, pairs: list[Pair], **where: Any) -> Iterator[Difference]:
    """Compare the variables of the modules other than parameters, after the run."""
    from flax import nnx

    buffers = {name: to_numpy(x) for name, x in theirs.named_buffers()}
    for subject, held in in_torch(ours, nnx.Not(nnx.Param), pairs).items():
        for name, x in held.items():
            if name in buffers and x.shape == buffers[name].shape:
                variance = buffers.get(name.replace("running_mean", "running_var"), buffers[name])
                scale = float(np.sqrt(_largest(variance))) if name.endswith("running_mean") else 0.0
                one, other = {name: x}, {name: buffers[name]}
                yield from by_leaf(one, other, scale=scale, part="state", subject=subject, **where)


def _channels_first(ours: Any, theirs: Any, our_calls: list[Call]) -> list[int]:
    """The numbers of axes of the arrays that have their channels first in PyTorch and last in Flax."""
    from flax import nnx

    seen = {x.ndim for call in our_calls for x in call.inputs if moves_channels(call.layer.module, x)}
    norms = [x for _, x in nnx.iter_modules(ours) if isinstance(x, nnx.BatchNorm)]
    names = {c.__name__ for x in theirs.modules() for c in type(x).__mro__ if c.__module__.startswith("torch.nn")}
    by_channel = {name for name in names if name[-2:] in ("1d", "2d", "3d")} - {"BatchNorm1d"}  # it takes [N, C] too
    if any(norm.axis not in (-1, (-1,)) for norm in norms):
        by_channel -= {"BatchNorm2d", "BatchNorm3d"}
    return sorted(seen | {int(name[-2]) + 2 for name in by_channel})


def _check_dropout(ours: Any, theirs: Any) -> None:
    from flax import nnx

    on = [f"`{path}` of PyTorch" for path, x in theirs.named_modules() if x.training and _torch_rate(x)]
    on += [
        f"`{'.'.join(map(str, path))}` of Flax"
        for path, x in nnx.iter_modules(ours)
        if not getattr(x, "deterministic", True) and _rate(x, "rate", "dropout_rate")
    ]
    if on:
        raise ValueError(f"compare_modules: {on[0]} drops at random: call .eval() on both modules first")


def _torch_rate(module: Any) -> float:
    is_dropout = any("Dropout" in c.__name__ for c in type(module).__mro__)
    return _rate(module, *["p"] * is_dropout, "dropout", "drop_prob")


def _rate(module: Any, *names: str) -> float:
    return next(
        (rate for rate in (getattr(module, name, None) for name in names) if isinstance(rate, int | float)), 0.0
    )


def _check_repeatable(theirs: Any, inputs: tuple[Any, ...]) -> None:
    """Raise an error if two runs differ: a dropout that is a function is not one of the module's layers."""
    import torch

    with torch.no_grad():
        one, other = (leaves(copy.deepcopy(theirs)(*inputs)) for _ in range(2))
    for name, x in one.items():
        if is_array(x) and is_float(x) and not torch.allclose(x, other[name], rtol=1e-2, atol=0, equal_nan=True):
            raise ValueError(
                "compare_modules: the PyTorch module gives other outputs each time that it runs: something in it draws at "
                "random, such as torch.nn.functional.dropout, which draws in eval mode too without training=self.training"
            )
