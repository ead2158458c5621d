"""The settings in which a Flax layer and its PyTorch counterpart differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from parity.layers import Call, Pair


def unseen(pair: Pair, call: Call, dtype: str) -> Iterator[str]:
    """Describe each setting that differs and may not show in the layer's output, or only later.

    Args:
        pair: the pair of layers.
        call: a call of the Flax layer.
        dtype: the dtype in which it computes.
    """
    import torch

    x, y = pair.ours.module, pair.theirs.module
    if pair.kind.endswith("Norm"):
        eps = torch.finfo(getattr(torch, dtype)).eps if y.eps is None else y.eps
        if not math.isclose(x.epsilon, eps, rel_tol=1e-6):
            yield f"epsilon is {x.epsilon:g} in Flax, eps is {eps:g} in PyTorch"
    if pair.kind == "BatchNorm":
        yield from _running(x, y, call.averages)


def shown(pair: Pair, call: Call) -> Iterator[str]:
    """Describe each other setting that differs; it shows in the output, unless the models compensate for it."""
    x, y = pair.ours.module, pair.theirs.module
    if pair.kind == "GroupNorm" and x.num_groups != y.num_groups:
        yield f"num_groups is {x.num_groups} in Flax, {y.num_groups} in PyTorch"
    elif pair.kind == "MultiHeadAttention" and x.num_heads != y.num_heads:
        yield f"num_heads is {x.num_heads} in Flax, {y.num_heads} in PyTorch"
    elif pair.kind in ("Conv", "ConvTranspose"):
        yield from _window(pair, call.inputs[0].shape)


def _running(x: Any, y: Any, averages: bool) -> Iterator[str]:
    if averages == y.training:
        modes = ["training", "eval"][averages], ["training", "eval"][not y.training]
        yield f"it is in {modes[0]} mode in Flax, in {modes[1]} mode in PyTorch"
    elif y.training and (y.momentum is None or not math.isclose(1 - x.momentum, y.momentum, rel_tol=1e-6)):
        has = "None, an average of all batches" if y.momentum is None else f"{y.momentum:g}"
        yield (
            f"momentum is {x.momentum:g} in Flax, which is {1 - x.momentum:g} in PyTorch, where it weighs the new batch; "
            f"there it is {has}"
        )


def _window(pair: Pair, shape: Sequence[int]) -> Iterator[str]:
    x, y = pair.ours.module, pair.theirs.module
    rank = len(x.kernel_size)
    same = True
    groups = getattr(x, "feature_group_count", 1)
    if groups != y.groups:
        yield f"feature_group_count is {groups} in Flax, groups is {y.groups} in PyTorch"
    for ours, theirs in (("strides", "stride"), ("kernel_dilation", "dilation")):
        one, other = _each(getattr(x, ours), rank), _each(getattr(y, theirs), rank)
        if one != other:
            same = False
            yield f"{ours} is {one} in Flax, {theirs} is {other} in PyTorch"
    fill = {"CIRCULAR": "circular", "REFLECT": "reflect"}.get(x.padding if isinstance(x.padding, str) else "", "zeros")
    if fill != y.padding_mode:
        yield f"padding is {x.padding!r} in Flax, padding_mode is {y.padding_mode!r} in PyTorch"
    elif same:
        a, b = _our_padding(pair, shape), _their_padding(pair)
        if a != b:
            yield f"padding is {x.padding!r} in Flax, here {a}, and {y.padding!r} in PyTorch, here {b}"


def _each(value: Any, rank: int) -> tuple[int, ...]:
    """One value for each axis of the window."""
    return tuple(value) if isinstance(value, Sequence) else (1 if value is None else value,) * rank


def _our_padding(pair: Pair, shape: Sequence[int]) -> list[tuple[int, int]]:
    """The padding before and after each axis; for a transposed convolution, that of the input with inserted strides."""
    import jax

    x = pair.ours.module
    rank = len(x.kernel_size)
    windows = [(k - 1) * d + 1 for k, d in zip(x.kernel_size, _each(x.kernel_dilation, rank), strict=True)]
    strides = _each(x.strides, rank)
    if not isinstance(x.padding, str):
        each = (x.padding,) * rank if isinstance(x.padding, int) else x.padding
        return [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in each]
    if x.padding == "CAUSAL":
        return [(window - 1, 0) for window in windows]
    if pair.kind == "ConvTranspose":
        return [_transposed(window, stride, x.padding) for window, stride in zip(windows, strides, strict=True)]
    strides, lax = (strides, x.padding) if x.padding in ("SAME", "VALID") else ((1,) * rank, "SAME")
    pads = jax.lax.padtype_to_pads(list(shape[-1 - rank : -1]), windows, strides, lax)
    return [(int(low), int(high)) for low, high in pads]


def _transposed(window: int, stride: int, padding: str) -> tuple[int, int]:
    if padding == "VALID":
        return window - 1, stride - 1 + max(window - stride, 0)
    total = window + stride - 2
    before = window - 1 if stride > window - 1 else math.ceil(total / 2)
    return before, total - before


def _their_padding(pair: Pair) -> list[tuple[int, int]]:
    y = pair.theirs.module
    rank = len(y.kernel_size)
    windows = [(k - 1) * d + 1 for k, d in zip(y.kernel_size, _each(y.dilation, rank), strict=True)]
    if isinstance(y.padding, str):
        pads = [(window - 1) // 2 if y.padding == "same" else 0 for window in windows]
        return [(p, window - 1 - p if y.padding == "same" else 0) for p, window in zip(pads, windows, strict=True)]
    if pair.kind == "Conv":
        return [(p, p) for p in _each(y.padding, rank)]
    both = zip(windows, _each(y.padding, rank), _each(y.output_padding, rank), strict=True)
    return [(window - 1 - p, window - 1 - p + more) for window, p, more in both]
