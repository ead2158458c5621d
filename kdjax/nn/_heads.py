"""What features pass on their way to a loss."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax._numerics import promote
from kdjax._typing import Array, describe


def through(head: Callable, name: str, x: Array, dim: int, constant: bool = False) -> jax.Array:
    """What a head makes of features of its width."""
    if not (isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.shape[-1:] == (dim,)):
        raise TypeError(f"`{name}` must be Float[Array, '*batch {dim}'], got {describe(x)}")
    (x,) = promote(jax.lax.stop_gradient(x) if constant else x)
    return head(x)
