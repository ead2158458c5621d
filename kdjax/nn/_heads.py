"""Layers that features pass through before a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax._numerics import promote
from kdjax._reduce import zero_masked
from kdjax._typing import Array, describe
from kdjax.nn._state import movable


def through(
    head: Callable,
    name: str,
    x: Array,
    dim: int,
    constant: bool = False,
    maps: bool = False,
    where: Array | None = None,
) -> jax.Array:
    """The output of a head for features or maps, whose width is checked; masked examples are set to 0 before it."""
    return head(prepared(name, x, dim, constant, maps, where))


def prepared(
    name: str, x: Array, dim: int, constant: bool = False, maps: bool = False, where: Array | None = None
) -> jax.Array:
    """Features whose width is checked, in float32 or wider. A mask that does not fit is left to the loss to report."""
    fits = isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.shape[-1:] == (dim,)
    if not fits or (maps and x.ndim != 4):
        axes = f"batch height width {dim}" if maps else f"*batch {dim}"
        raise TypeError(f"`{name}` must be Float[Array, {axes!r}], got {describe(x)}")
    (x,) = promote(jax.lax.stop_gradient(x) if constant else x)
    if isinstance(where, Array) and where.dtype == bool and where.shape == x.shape[: where.ndim]:
        (x,) = zero_masked(where, x)  # otherwise the head's gradient would be 0 times NaN
    return x


class BatchNorm(nnx.BatchNorm):
    """With the running variance of PyTorch, which divides by n - 1, so that training can continue in PyTorch."""

    def __call__(self, x: Array, *args: Any, **options: Any) -> jax.Array:
        if not self.use_running_average:
            for name in ("mean", "var"):
                movable(self, name)
        kept = self.momentum * self.var[...]
        normalised = super().__call__(x, *args, **options)
        if not self.use_running_average:
            number = x.size // x.shape[-1]
            self.var[...] = kept + (self.var[...] - kept) * (number / max(number - 1, 1))
        return normalised
