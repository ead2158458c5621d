"""Layers that features pass through before a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtorch._numerics import promote
from kdtorch._reduce import zero_masked
from kdtorch._typing import describe


def through(
    head: nn.Module,
    name: str,
    x: Tensor,
    dim: int,
    constant: bool = False,
    maps: bool = False,
    where: Tensor | None = None,
) -> Tensor:
    """The output of a head for features or maps, whose width is checked; masked examples are set to 0 before it."""
    return head(prepared(head, name, x, dim, constant, maps, where))


def prepared(
    head: nn.Module,
    name: str,
    x: Tensor,
    dim: int,
    constant: bool = False,
    maps: bool = False,
    where: Tensor | None = None,
) -> Tensor:
    """Features whose width is checked, in the dtype of a head's weights. A mask that does not fit is left to the
    loss to report."""
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.shape[1 if maps else -1 :][:1] == (dim,)
    if not fits or (maps and x.ndim != 4):
        axes = f"batch {dim} height width" if maps else f"*batch {dim}"
        raise TypeError(f"`{name}` must be Float[Array, {axes!r}], got {describe(x)}")
    (x,) = promote(x.detach() if constant else x)
    if isinstance(where, Tensor) and where.dtype == torch.bool and where.shape == x.shape[: where.ndim]:
        (x,) = zero_masked(where, x)  # otherwise the head's gradient would be 0 times NaN
    # not `parameters()`, which may be empty in parts of a model under FSDP and DataParallel
    weights = (getattr(part, "weight", None) for part in head.modules())
    return x.to(next((weight.dtype for weight in weights if weight is not None), x.dtype))
