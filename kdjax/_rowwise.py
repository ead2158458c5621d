"""What runs a function of rows: under masks, in any precision, and with a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from kdjax._numerics import kl_and_gradient, widest
from kdjax._reduce import zero_masked


def rowwise(value_and_gradient: Callable[..., tuple[Array, Array]], axes: int = 1) -> Callable[..., Array]:
    """A function of rows from one that returns the value of each and its gradient with respect to its first argument.

    The value of a row depends on that row alone. The first argument is `[*batch, n]`, or has so many `axes` after the
    batch's. The others are constant: `[*batch, ...]`, or numbers; a number that has a tangent gets a gradient. What is
    returned takes them as the user gave them, in half precision too, and a mask of the batch, `where=`.

    Until the backward pass only the gradient is held, in the dtype of the first argument: neither another copy of it nor
    anything of the others. The gradient is itself made of differentiable operations, so the result can be
    differentiated again.
    """

    def with_slopes(learned: Sequence[int], x: Array, *others: Any) -> tuple[Array, ...]:
        """The value, its gradient, and its derivative with respect to each of the numbers that have one."""

        def slope(i: int) -> Array:
            def value(number: Array) -> Array:
                return value_and_gradient(x, *others[:i], number, *others[i + 1 :])[0]

            return jax.jvp(value, (others[i],), (jnp.ones_like(others[i]),))[1]

        return *value_and_gradient(x, *others), *map(slope, learned)

    @jax.custom_jvp
    def values(where: Array | None, x: Array, *others: Any) -> Array:
        return by_rows(lambda *rows: value_and_gradient(*rows)[:1], where, x, *others)[0]

    @functools.partial(values.defjvp, symbolic_zeros=True)
    def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        where, x, *others = primals
        _, moved, *steps = tangents
        learned = [i for i, v in enumerate(others) if _is_number(v) and not isinstance(steps[i], SymbolicZero)]
        result, gradient, *slopes = by_rows(functools.partial(with_slopes, learned), where, x, *others)
        tangent = jnp.zeros_like(result)
        if not isinstance(moved, SymbolicZero):
            tangent = _dot(axes, moved, *pack(gradient, x.dtype, axes))
        for i, slope in zip(learned, slopes, strict=True):
            tangent = tangent + slope * steps[i]
        return result, tangent

    def value(x: Array, *others: Any, where: Array | None = None) -> Array:
        inputs = jax.tree.map(lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, (where, x, *others))
        return values(*inputs)

    return value


def by_rows(
    function: Callable[..., tuple[Array, ...]], where: Array | None, x: Array, *others: Any
) -> tuple[Array, ...]:
    """What a function makes of the rows of x and of the others, in float32 or wider; what it makes of masked rows is 0."""
    return zero_masked(where, *function(*_wide(where, x, *others)))


def _has_rows(value: Any) -> bool:
    return isinstance(value, Array) and value.ndim > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating)


def _wide(where: Array | None, *inputs: Any) -> tuple[Any, ...]:
    """The inputs in float32 or wider, with 0 in the masked rows."""
    dtype = widest(*(v for v in jax.tree.leaves(inputs) if _is_floating(v)))

    def wide(v: Any) -> Any:
        v = v.astype(dtype) if _is_floating(v) else v
        return zero_masked(where, v)[0] if _has_rows(v) else v

    return jax.tree.map(wide, inputs)


def _is_floating(value: Any) -> bool:
    return _has_rows(value) and jnp.issubdtype(value.dtype, jnp.floating)


def pack(gradient: Array, dtype: DTypeLike, axes: int) -> tuple[Array, ...]:
    """A gradient in another dtype; in float16, whose range is small, as multiples of a number for each row.

    Users of float16 multiply the loss, so that its gradient does not vanish, in the backward pass, which is later. A
    number that is not finite is left as it is, and the others of its row too.
    """
    if dtype != jnp.float16:
        return (gradient.astype(dtype),)
    sizes = jax.lax.stop_gradient(jnp.abs(gradient))
    largest = jnp.where(jnp.isfinite(sizes), sizes, 0).max(tuple(range(-axes, 0)), keepdims=True)
    unit = jnp.maximum(largest, jnp.finfo(largest.dtype).tiny * 2**16) / 2**15
    return (gradient / unit).astype(dtype), unit


# what is linear in `moved` is made again in the backward pass, so that no wider copy of the gradient waits for it
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _dot(axes: int, moved: Array, gradient: Array, unit: Array | None = None) -> Array:
    """The sum over a row of a packed gradient times how the row moves, in float32 or wider."""
    (gradient, moved), over = (x.astype(widest(gradient)) for x in (gradient, moved)), tuple(range(-axes, 0))
    product = gradient * moved if unit is None else gradient * unit * moved
    return product.sum(over)


kl_divergence = rowwise(kl_and_gradient)
