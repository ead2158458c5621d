"""What features pass on their way to a loss."""

from __future__ import annotations

from torch import Tensor, nn

from kdtorch._numerics import promote
from kdtorch._typing import describe


def through(head: nn.Module, name: str, x: Tensor, dim: int, constant: bool = False) -> Tensor:
    """What a head makes, in the precision of its weights, of features of its width."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1:] == (dim,)):
        raise TypeError(f"`{name}` must be Float[Array, '*batch {dim}'], got {describe(x)}")
    (x,) = promote(x.detach() if constant else x)
    # not `parameters()`, of which FSDP and DataParallel leave a part of theirs none
    weights = (getattr(part, "weight", None) for part in head.modules())
    return head(x.to(next((weight.dtype for weight in weights if weight is not None), x.dtype)))
