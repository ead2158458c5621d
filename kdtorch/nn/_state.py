"""How a module holds and updates the state of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Stateful(nn.Module):
    """A loss with a state in its buffers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by `to`, `half`, `bfloat16` and so on. The state stays in float32, where small steps are not lost."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, x in self.named_buffers(recurse=False):
            if x.dtype.itemsize < 4:
                self._buffers[name] = before[name].to(x.device, torch.float32)
        return self

    def _move(self, **values: Tensor) -> None:
        """Write into the buffers, as PyTorch's normalisation layers do, so that whoever shares one sees the change."""
        with torch.no_grad():
            for name, value in values.items():
                getattr(self, name).copy_(value)
