"""What runs a function of rows on the logits of two linear heads, which are made a block at a time and dropped."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from kdjax._numerics import HIGHEST, dot, widest
from kdjax._reduce import zero_masked
from kdjax._rowwise import pack
from kdjax._typing import Scalar

BLOCK = 2**22  # entries of the logits of a block of rows, and of a part of a head's gradient


class Student(NamedTuple):
    """What learns: hidden states `[*batch, dim]`, a head `[classes, dim]` with its bias or None, and T.

    Field by field also their gradients, or whether these are asked for.
    """

    hidden: Any
    weight: Any
    bias: Any
    temperature: Any


class Fixed(NamedTuple):
    """What is constant."""

    hidden: Array
    weight: Array
    bias: Array | None
    where: Array | None
    settings: tuple[Scalar, ...] = ()


def linear(
    value_and_gradient: Callable[..., tuple[Array, Array]], of_teacher: Callable[..., Array]
) -> Callable[..., Array]:
    """A function of a student's and a teacher's hidden states and heads from one of rows of logits.

    `value_and_gradient(x, y, *settings, temperature)` returns the value of each row and its gradient by x, and
    `of_teacher` the gradient by y; the value must be one of x / T and y / T, so that its derivative by T is
    -(x · ∂x + y · ∂y) / T. What is returned gives the sum over the kept rows, whose gradients are made with it and are all
    that is held, or with `summed=False` a value a row, whose gradients the backward pass makes from the inputs.
    """
    evaluate = functools.partial(_evaluate, value_and_gradient, of_teacher)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def values(summed: bool, student: Student, fixed: Fixed) -> Array:
        value = evaluate(student, fixed, None, Student(False, False, False, False))[0]
        return value.sum() if summed else value

    def forward(summed: bool, student: Student, fixed: Fixed) -> tuple[Array, tuple[Any, Any]]:
        asked = Student(*(jax.tree.leaves(jax.tree.map(lambda v: v.perturbed, x)) == [True] for x in student))
        student, fixed = jax.tree.map(lambda v: v.value, (student, fixed))
        value, gradients = evaluate(student, fixed, None, asked if summed else Student(False, False, False, False))
        if summed:
            held = (None if g is None else pack(g, x.dtype, 0) for g, x in zip(gradients, student, strict=True))
            return value.sum(), (Student(*held), None)
        return value, (Student(*(() if wanted else None for wanted in asked)), (student, fixed))

    def backward(summed: bool, held: tuple[Any, Any], cotangent: Any) -> tuple[Student, None]:
        gradients, inputs = held
        if isinstance(cotangent, SymbolicZero):
            cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        if not summed:
            asked = Student(*(x is not None for x in gradients))
            student, fixed = inputs
            gradients = evaluate(student, fixed, cotangent, asked)[1]
            return Student(*map(lambda g, x: None if g is None else g.astype(x.dtype), gradients, student)), None

        def scaled(gradient: Array, unit: Array | None = None) -> Array:
            above = cotangent if unit is None else cotangent * unit
            return (above * gradient.astype(cotangent.dtype)).astype(gradient.dtype)

        return Student(*(None if g is None else scaled(*g) for g in gradients)), None

    values.defvjp(forward, backward, symbolic_zeros=True)

    def differentiable(student: Student, fixed: Fixed, summed: bool) -> Array:
        student, fixed = jax.tree.map(jnp.asarray, (student, fixed))
        return values(summed, *jax.tree.map(functools.partial(_varying, _axes((student, fixed))), (student, fixed)))

    return differentiable


def _axes(arrays: Any) -> frozenset[str]:
    """The axes of a mesh along which some of the arrays may differ between devices, inside `shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))


def _varying(axes: frozenset[str], x: Array) -> Array:
    """x as one that may differ between the devices along these axes; its gradient is then their sum."""
    missing = tuple(axes - _axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _evaluate(
    value_and_gradient: Callable[..., tuple[Array, Array]],
    of_teacher: Callable[..., Array],
    student: Student,
    fixed: Fixed,
    weights: Array | None,
    asked: Student,
) -> tuple[Array, Student]:
    """The value of each row, and the gradients of their weighted sum that are asked for."""
    arrays = student.hidden, student.weight, fixed.hidden, fixed.weight
    dtype, (classes, _) = widest(*arrays), student.weight.shape
    batch = student.hidden.shape[:-1]
    number = math.prod(batch)
    size = max(min(number, BLOCK // classes), 1)
    axes = _axes((student, fixed))

    def blocks(x: Array) -> Array:
        x = x.reshape(number, *x.shape[len(batch) :])
        x = jnp.pad(x, ((0, -number % size), *((0, 0) for _ in x.shape[1:])))
        return x.reshape(-1, size, *x.shape[1:])

    def step(totals: Student, rows: tuple[Array, ...]) -> tuple[Student, tuple[Array, Array | None]]:
        h, of_other, kept, factor = rows
        h, of_other = zero_masked(kept, h, of_other)
        x = _logits(h, student.weight, student.bias, dtype)
        y = _logits(of_other, fixed.weight, fixed.bias, dtype)
        value, gradient = value_and_gradient(x, y, *fixed.settings, student.temperature)
        value, gradient = zero_masked(kept, value, gradient if factor is None else gradient * factor[:, None])
        if asked.temperature:
            pull = of_teacher(x, y, *fixed.settings, student.temperature)
            (pull,) = zero_masked(kept, pull if factor is None else pull * factor[:, None])
            slope = -(dot(gradient, x) + dot(pull, y)).sum() / student.temperature
            totals = totals._replace(temperature=totals.temperature + slope)
        if asked.bias:
            totals = totals._replace(bias=totals.bias + gradient.sum(0))
        if asked.weight:
            totals = totals._replace(weight=_add_product(totals.weight, gradient, h))
        return totals, (value, _product(gradient, student.weight, dtype) if asked.hidden else None)

    def zeros(wanted: bool, like: Any) -> Array | None:
        return _varying(axes, jnp.zeros(jnp.shape(like), dtype)) if wanted else None

    start = Student(None, *(zeros(*x) for x in zip(asked[1:], student[1:], strict=True)))
    where = jnp.ones(batch, bool) if fixed.where is None else fixed.where
    rows = student.hidden, fixed.hidden, where, weights
    totals, (value, pulled) = jax.lax.scan(step, start, jax.tree.map(blocks, rows))
    value = value.reshape(-1)[:number].reshape(batch)
    if pulled is not None:
        pulled = pulled.reshape(-1, pulled.shape[-1])[:number].reshape(student.hidden.shape)
    return value, totals._replace(hidden=pulled)


def _logits(hidden: Array, weight: Array, bias: Array | None, dtype: DTypeLike) -> Array:
    """hidden weightᵀ + bias, summed in `dtype` from what the two are in, so that there is no wider copy of the head."""
    logits = _contracted(hidden, weight, 1, 1, dtype)
    return logits if bias is None else logits + bias.astype(dtype)[None]


def _product(gradient: Array, weight: Array, dtype: DTypeLike) -> Array:
    return _contracted(gradient, weight, 1, 0, dtype)


def _contracted(a: Array, b: Array, axis: int, other: int, dtype: DTypeLike) -> Array:
    return jax.lax.dot_general(
        a, b, (((axis,), (other,)), ((), ())), precision=HIGHEST, preferred_element_type=jnp.dtype(dtype)
    )


def _add_product(total: Array, gradient: Array, hidden: Array) -> Array:
    """total + gradientᵀ hidden, a part of the classes at a time and in place, so that no second array is as large."""
    classes, dim = total.shape
    size = max(BLOCK // dim, 1)

    def add(first: Array | int, total: Array, size: int = size) -> Array:
        part = jax.lax.dynamic_slice_in_dim(gradient, first, size, 1)
        product = _contracted(part, hidden, 0, 0, total.dtype)
        old = jax.lax.dynamic_slice_in_dim(total, first, size)
        return jax.lax.dynamic_update_slice_in_dim(total, old + product, first, 0)

    whole = classes // size
    total = jax.lax.fori_loop(0, whole, lambda i, total: add(i * size, total), total) if whole else total
    return add(whole * size, total, classes % size) if classes % size else total
