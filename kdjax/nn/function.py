"""A function as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class FunctionLoss(nnx.Module):
    """A loss without parameters or state, with its options.

    Args:
        function: the loss.
        options: its settings by name.

    >>> import jax.numpy as jnp
    >>> from kdjax.nn import FunctionLoss
    >>> from kdjax import mse_loss
    >>> print(FunctionLoss(mse_loss)(jnp.ones((2, 3)), jnp.zeros((2, 3))))
    1.0
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function, self.options = function, tuple(options.items())

    def __call__(self, *inputs: Any, **options: Any) -> jax.Array:
        """The function's value.

        Args:
            inputs: of the function.
            options: in addition to those that it was built with, or to override them.

        Returns:
            What the function gives.
        """
        return self.function(*inputs, **{**dict(self.options), **options})
