"""Runs functions of rows: with masks, in any precision, and with a gradient."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from kdjax._collectives import all_sum
from kdjax._numerics import kl_and_gradient, widest
from kdjax._reduce import zero_masked
from kdjax._typing import AxisName


def rowwise(value_and_gradients: Callable[..., tuple[Array, ...]], learns: int = 1) -> Callable[..., Array]:
    """Make a differentiable function of rows from one that returns their values and gradients.

    The gradients are those with respect to the first `learns` arguments. The value of a row depends on that row alone.
    The inputs are `[*batch, ...]`, or numbers. The inputs after the first `learns` are constant, except that a number
    with a tangent gets a gradient. The function that is returned takes the inputs in any precision, and a mask of the
    batch, `where=`. With `class_axis_name=`, which is passed on, each device has a part of every row and returns the
    value of the whole row.

    Until the backward pass only the gradients are stored, in the dtypes of their arguments, and nothing of the inputs.
    The gradients consist of differentiable operations, so the result can be differentiated again.
    """

    def over(class_axis_name: AxisName | None) -> Callable[..., tuple[Array, ...]]:
        if class_axis_name is None:
            return value_and_gradients
        return functools.partial(value_and_gradients, class_axis_name=class_axis_name)

    def with_slopes(class_axis_name: AxisName | None, numbers: Sequence[int], *inputs: Any) -> tuple[Array, ...]:
        """The value, its gradients, and its derivative with respect to each of the numbers that have one."""
        evaluate = over(class_axis_name)

        def slope(i: int) -> Array:
            def value(number: Array) -> Array:
                return evaluate(*inputs[:i], number, *inputs[i + 1 :])[0]

            return jax.jvp(value, (inputs[i],), (jnp.ones_like(inputs[i]),))[1]

        return *evaluate(*inputs), *map(slope, numbers)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def values(class_axis_name: AxisName | None, where: Array | None, *inputs: Any) -> Array:
        return by_rows(lambda *rows: over(class_axis_name)(*rows)[:1], where, *inputs)[0]

    @functools.partial(values.defjvp, symbolic_zeros=True)
    def _(class_axis_name: AxisName | None, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        (where, *inputs), (_, *steps) = primals, tangents
        moved = [i for i, step in enumerate(steps) if not isinstance(step, SymbolicZero)]
        numbers = [i for i in moved if i >= learns and _is_number(inputs[i])]
        result, *slopes = by_rows(functools.partial(with_slopes, class_axis_name, numbers), where, *inputs)
        parts = [
            all_sum(_dot(result.ndim, steps[i], *pack(slopes[i], inputs[i].dtype, result.ndim)), class_axis_name)
            for i in moved
            if i < learns
        ]
        parts += [slope * steps[i] for i, slope in zip(numbers, slopes[learns:], strict=True)]
        return result, functools.reduce(operator.add, parts) if parts else jnp.zeros_like(result)

    def value(*inputs: Any, where: Array | None = None, class_axis_name: AxisName | None = None) -> Array:
        arrays = jax.tree.map(lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, (where, *inputs))
        return values(class_axis_name, *arrays)

    return value


def by_rows(function: Callable[..., tuple[Array, ...]], where: Array | None, *inputs: Any) -> tuple[Array, ...]:
    """Apply a function to the rows of its inputs, in float32 or wider; its results for masked rows become 0."""
    return zero_masked(where, *function(*_wide(where, *inputs)))


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


def pack(gradient: Array, dtype: DTypeLike, batch: int) -> tuple[Array, ...]:
    """A gradient in another dtype; in float16, whose range is small, as multiples of one number per row.

    The first `batch` axes number the rows. Users of float16 scale the loss so that its gradient does not underflow, but
    that scale arrives only in the backward pass. An entry that is not finite stays as it is, and the rest of its row
    too.
    """
    if dtype != jnp.float16:
        return (gradient.astype(dtype),)
    sizes = jax.lax.stop_gradient(jnp.abs(gradient))
    largest = jnp.where(jnp.isfinite(sizes), sizes, 0).max(tuple(range(batch, sizes.ndim)), keepdims=True)
    unit = jnp.maximum(largest, jnp.finfo(largest.dtype).tiny * 2**16) / 2**15
    return (gradient / unit).astype(dtype), unit


# computed again in the backward pass, so that no wider copy of the gradient is stored
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _dot(batch: int, moved: Array, gradient: Array, unit: Array | None = None) -> Array:
    """The sum over each row of a packed gradient times `moved`, the tangent of the row, in float32 or wider."""
    gradient, moved = (x.astype(widest(gradient)) for x in (gradient, moved))
    product = gradient * moved if unit is None else gradient * unit * moved
    return product.sum(tuple(range(batch, product.ndim)))


kl_divergence = rowwise(kl_and_gradient)
