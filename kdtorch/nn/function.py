"""A function as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FunctionLoss(nn.Module):
    """A loss without parameters or state, with its options.

    Args:
        function: the loss.
        options: its settings by name.

    >>> import torch
    >>> from kdtorch.nn import FunctionLoss
    >>> from kdtorch import mse_loss
    >>> print(FunctionLoss(mse_loss)(torch.ones((2, 3)), torch.zeros((2, 3))).item())
    1.0
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, tuple(options.items())

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The function's value.

        Args:
            inputs: of the function.
            options: in addition to those that it was built with, or to override them.

        Returns:
            What the function gives.
        """
        return self.function(*inputs, **{**dict(self.options), **options})
