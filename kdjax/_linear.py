"""Compares the logits of linear heads; only the logits of one block of classes are in memory at a time."""

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

from kdjax._collectives import all_max, all_sum, class_max, class_sum, on_first
from kdjax._numerics import HIGHEST, dot, widest
from kdjax._reduce import zero_masked
from kdjax._rowwise import pack
from kdjax._typing import AxisName, Scalar

BLOCK = 2**22  # entries of the logits of a block of classes
LEAST = 2**21  # the same for memory="least"


class Output(NamedTuple):
    """How a head makes logits: z = scale (h · w + b), and with a cap c then c tanh(z / c). None leaves out a step."""

    scale: Scalar | None = None
    cap: Scalar | None = None


class Student(NamedTuple):
    """What is trained: hidden states `[*batch, dim]`, a head `[classes, dim]`, its bias or None, and T.

    The same fields also hold the gradients, or whether each gradient is needed.
    """

    hidden: Any
    weight: Any
    bias: Any
    temperature: Any


class Fixed(NamedTuple):
    """What is constant.

    Attributes:
        rows: the teacher's hidden states, or without a head what was recorded of its logits; each `[*batch, ...]`.
        weight: the weight of the teacher's head, or None.
        bias: the bias of the teacher's head, or None.
        where: which rows are kept.
        weights: factors of the rows' values, `[*batch]`.
        outputs: the student's and the teacher's.
        settings: the settings of the divergence, without T.
    """

    rows: tuple[Array, ...]
    weight: Array | None
    bias: Array | None
    where: Array | None
    weights: Array | None
    outputs: tuple[Output, Output]
    settings: tuple[Scalar, ...] = ()


# A divergence computed in blocks of classes. Its arguments are `over_classes`, which applies a step to one block after
# another, an array with the shape and dtype of the values, y, the settings and T. It returns the value of each row, and
# a function that returns a block's gradient with respect to x, and y · ∂y of each row.
ByClasses = Callable[..., tuple[Array, Callable[..., tuple[Array, Array]]]]


def linear(divergence: ByClasses) -> Callable[..., Array]:
    """Turn a divergence between logits into a function of the student's hidden states and head, and of constants.

    The function returns the sum over the kept rows, computes the gradients together with the sum, and stores nothing
    else. With `summed=False` it returns one value per row, and the backward pass computes gradients from the inputs.
    With a `class_axis_name`, each device has the rows of the heads for some of the classes.
    """
    nothing = Student(False, False, False, False)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
    def values(summed: bool, least: bool, class_axis_name: AxisName | None, student: Student, fixed: Fixed) -> Array:
        """The value, on devices that share the classes on the first and 0 on the others, so that JAX sums gradients."""
        value = _evaluate(divergence, least, class_axis_name, student, fixed, None, nothing)[0]
        return on_first(value.sum() if summed else value, class_axis_name, 0.0)

    def forward(
        summed: bool, least: bool, class_axis_name: AxisName | None, student: Student, fixed: Fixed
    ) -> tuple[Array, tuple[Any, Any]]:
        asked = Student(*(jax.tree.leaves(jax.tree.map(lambda v: v.perturbed, x)) == [True] for x in student))
        student, fixed = jax.tree.map(lambda v: v.value, (student, fixed))
        wanted = asked if summed else nothing
        value, gradients = _evaluate(divergence, least, class_axis_name, student, fixed, None, wanted)
        if summed:
            held = (None if g is None else pack(g, x.dtype, 0) for g, x in zip(gradients, student, strict=True))
            return on_first(value.sum(), class_axis_name, 0.0), (Student(*held), None)
        return on_first(value, class_axis_name, 0.0), (
            Student(*(() if wanted else None for wanted in asked)),
            (student, fixed),
        )

    def backward(
        summed: bool, least: bool, class_axis_name: AxisName | None, held: tuple[Any, Any], cotangent: Any
    ) -> tuple[Student, None]:
        gradients, inputs = held
        if isinstance(cotangent, SymbolicZero):
            cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
        if not summed:
            asked = Student(*(x is not None for x in gradients))
            student, fixed = inputs
            gradients = _evaluate(divergence, least, class_axis_name, student, fixed, cotangent, asked)[1]
            return Student(*map(lambda g, x: None if g is None else g.astype(x.dtype), gradients, student)), None

        def scaled(gradient: Array, unit: Array | None = None) -> Array:
            above = cotangent if unit is None else cotangent * unit
            return (above * gradient.astype(cotangent.dtype)).astype(gradient.dtype)

        return Student(*(None if g is None else scaled(*g) for g in gradients)), None

    values.defvjp(forward, backward, symbolic_zeros=True)

    def differentiable(
        student: Student, fixed: Fixed, summed: bool, least: bool, class_axis_name: AxisName | None
    ) -> Array:
        student, fixed = jax.tree.map(jnp.asarray, (student, fixed))
        varying = jax.tree.map(functools.partial(_varying, _axes((student, fixed))), (student, fixed))
        return all_sum(values(summed, least, class_axis_name, *varying), class_axis_name)

    return differentiable


def _axes(arrays: Any) -> frozenset[str]:
    """The axes of a mesh along which some of the arrays may differ between devices, inside `shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))


def _varying(axes: frozenset[str], x: Array) -> Array:
    """x, marked as an array that may differ between devices along these axes; its gradient is summed over them."""
    missing = tuple(axes - _axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _evaluate(
    divergence: ByClasses,
    least: bool,
    class_axis_name: AxisName | None,
    student: Student,
    fixed: Fixed,
    above: Array | None,
    asked: Student,
) -> tuple[Array, Student]:
    """The weighted value of each row, and the gradients, where they are `asked` for, of the sum of these values.

    In that sum each value is multiplied by its entry of `above`, the gradient of the loss with respect to the value.
    """
    batch = student.hidden.shape[:-1]
    number = math.prod(batch)
    axes = _axes((student, fixed))
    dtype = widest(student.hidden, student.weight, *fixed.rows, *([] if fixed.weight is None else [fixed.weight]))
    kept, weights = fixed.where, fixed.weights
    if weights is not None:
        kept = (weights != 0) if kept is None else kept & (weights != 0)
        weights = jnp.where(kept, weights, 0).astype(dtype)
    factor = weights if above is None else above if weights is None else above * weights

    def start(wanted: bool, like: Any) -> Array | None:
        # the gradient of each class is written only once, so it may be rounded immediately
        exact = like.dtype if like is student.weight and like.dtype == jnp.bfloat16 else dtype
        return _varying(axes, jnp.zeros(jnp.shape(like), exact)) if wanted else None

    if fixed.weight is None:
        rows = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, fixed.rows)
        fixed = fixed._replace(rows=rows)
    totals = Student(*map(start, asked, student))
    flat = jax.tree.map(lambda x: x.reshape(number, *x.shape[len(batch) :]), (student.hidden, fixed.rows, kept, factor))
    if totals.hidden is not None:
        totals = totals._replace(hidden=totals.hidden.reshape(number, student.hidden.shape[-1]))
    entries = LEAST if least else BLOCK
    value, totals = _by_classes(divergence, entries, class_axis_name, student, fixed, flat, totals, dtype, axes)
    if totals.hidden is not None:
        totals = totals._replace(hidden=totals.hidden.reshape(student.hidden.shape))
    value = value.reshape(batch)
    return value if weights is None else value * weights, totals


def _by_classes(
    divergence: ByClasses,
    entries: int,
    class_axis_name: AxisName | None,
    student: Student,
    fixed: Fixed,
    rows: tuple[Any, ...],
    totals: Student,
    dtype: DTypeLike,
    axes: frozenset[str],
) -> tuple[Array, Student]:
    """Compute in blocks of classes: first the sums over all classes of each row, then the gradients."""
    h, others, kept, factor = rows
    h, *others = zero_masked(kept, h, *others)
    (number, dim), (classes, _) = h.shape, student.weight.shape
    size = min(classes, max(entries // max(number, dim), 16))

    def cut(x: Any, first: Array | int, size: int) -> Any:
        if x is None:
            return None
        part = jax.lax.dynamic_slice_in_dim(x, first, size)
        # without it, XLA on a CPU copies the whole head to float32, in which it multiplies, before the first block
        return jax.lax.optimization_barrier(part) if x.dtype.itemsize < 4 else part

    def logits(first: Array | int, size: int) -> list[Array]:
        x = _logits(h, cut(student.weight, first, size), cut(student.bias, first, size), fixed.outputs[0], dtype)
        if fixed.weight is None:
            return [x]
        head = cut(fixed.weight, first, size), cut(fixed.bias, first, size)
        return [x, _logits(others[0], *head, fixed.outputs[1], dtype)]

    def over_classes(step: Callable[..., Any], start: Any) -> Any:
        """Call `step(sums, first, *logits)` for one block of classes after another."""

        def one(first: Array | int, sums: Any, size: int = size) -> Any:
            return step(sums, first, *logits(first, size))

        start = jax.tree.map(functools.partial(_varying, axes), start)
        sums = jax.lax.fori_loop(0, classes // size, lambda i, sums: one(i * size, sums), start)
        return one(classes - classes % size, sums, classes % size) if classes % size else sums

    def add(totals: Student, first: Array | int, *logits: Array) -> Student:
        gradient, pull = gradient_of(first, *logits)
        if factor is not None:
            gradient, pull = gradient * factor[:, None], pull * factor
        gradient, pull = zero_masked(kept, gradient, pull)
        if totals.temperature is not None:
            slope = -(dot(gradient, logits[0]) + pull).sum() / student.temperature
            totals = totals._replace(temperature=totals.temperature + slope)
        gradient = _through(gradient, logits[0], fixed.outputs[0])
        if totals.bias is not None:
            part = gradient.sum(0)
            totals = totals._replace(bias=jax.lax.dynamic_update_slice_in_dim(totals.bias, part, first, 0))
        if totals.weight is not None:
            part = _contracted(gradient, h, 0, 0, dtype).astype(totals.weight.dtype)
            totals = totals._replace(weight=jax.lax.dynamic_update_slice_in_dim(totals.weight, part, first, 0))
        if totals.hidden is not None:
            weight = cut(student.weight, first, gradient.shape[1])
            totals = totals._replace(hidden=totals.hidden + _contracted(gradient, weight, 1, 0, dtype))
        return totals

    known = () if fixed.weight is not None else tuple(others)
    settings = *fixed.settings, student.temperature
    start = jnp.zeros(number, dtype)
    value, gradient_of = divergence(over_classes, start, *known, *settings, class_axis_name=class_axis_name)
    if any(x is not None for x in totals):
        totals = over_classes(add, totals)
    return zero_masked(kept, value)[0], totals


class Sums(NamedTuple):
    """For each row, over the classes so far: the largest logit, Σ w with w = exp((logit - largest) / T), and Σ w d.

    d is x - y, after the largest logit of each has been subtracted.
    """

    peak: Array
    total: Array
    apart: Array


def of_heads(
    f: Callable[..., Array],
    g: Callable[..., Array],
    means: Callable[[Array, Array], tuple[Array | None, Array | None]] | None = None,
) -> ByClasses:
    """A divergence E_p[f] + E_q[g] in blocks of classes, where p = softmax(x / T) and q = softmax(y / T).

    The function `f(log p, log q, *settings)` returns p f of each class, and the function `g` returns q g. The gradients
    with respect to x and y must be p (f - E_p[f]) / T and q (g - E_q[g]) / T. If `means` is given, it computes E_p[f]
    and E_q[g] from E_p[r] and E_q[r], r = log(p / q), and returns None for a mean that is 0; then one pass over the
    classes precedes the gradients. Without `means` there are two.
    """

    def by_classes(
        over_classes: Callable[..., Any], rows: Array, *settings: Any, class_axis_name: AxisName | None
    ) -> tuple[Array, Callable[..., tuple[Array, Array]]]:
        *others, temperature = settings
        least, zero = jnp.full_like(rows, jnp.finfo(rows.dtype).min), jnp.zeros_like(rows)

        def moved(sums: tuple[Sums, Sums], peaks: list[Array]) -> list[Sums]:
            """The same sums with respect to other largest logits."""
            step = (sums[0].peak - sums[1].peak) - (peaks[0] - peaks[1])  # the change of all d
            new = []
            for old, peak in zip(sums, peaks, strict=True):
                decay = _weight(old.peak - peak, temperature)
                apart = jnp.where(decay == 0, 0, decay * (old.apart + step * old.total))
                new.append(Sums(peak, decay * old.total, apart))
            return new

        def gather(sums: tuple[Sums, Sums], first: Any, x: Array, y: Array) -> tuple[Sums, Sums]:
            peaks = [jnp.maximum(old.peak, z.max(-1)) for old, z in zip(sums, (x, y), strict=True)]
            x, y = (z - peak[:, None] for z, peak in zip((x, y), peaks, strict=True))
            d = difference(x, y)
            new = []
            for old, z in zip(moved(sums, peaks), (x, y), strict=True):
                weight = _weight(z, temperature)
                new.append(Sums(old.peak, old.total + weight.sum(-1), old.apart + dot(weight, d)))
            return new[0], new[1]

        ours, theirs = over_classes(gather, (Sums(least, zero, zero), Sums(least, zero, zero)))
        if class_axis_name is not None:
            each = moved((ours, theirs), [all_max(one.peak, class_axis_name) for one in (ours, theirs)])
            ours, theirs = (Sums(x.peak, *all_sum(x[1:], class_axis_name)) for x in each)
        logs = jnp.log(ours.total), jnp.log(theirs.total)

        def log_softmaxes(*logits: Array) -> list[Array]:
            each = zip(logits, (ours, theirs), logs, strict=True)
            return [(z - one.peak[:, None]) / temperature - log[:, None] for z, one, log in each]

        mean: Any
        if means is not None:
            mean = means(*(one.apart / one.total / temperature - (logs[0] - logs[1]) for one in (ours, theirs)))
        else:

            def add(sums: tuple[Array, Array], first: Any, x: Array, y: Array) -> tuple[Array, Array]:
                both = *log_softmaxes(x, y), *others
                return sums[0] + f(*both).sum(-1), sums[1] + g(*both).sum(-1)

            mean = all_sum(over_classes(add, (zero, zero)), class_axis_name)
        value = sum(m for m in mean if m is not None)

        def centred(of: Callable[..., Array], log: Array, mean: Array | None, both: tuple[Any, ...]) -> Array:
            result = of(*both)
            if mean is not None:  # it is infinite if only one of the two has a class at -inf; gradients stay finite
                result = result - jnp.exp(log) * jnp.where(jnp.isfinite(mean), mean, 0)[:, None]
            return result / temperature

        def gradient(first: Any, x: Array, y: Array) -> tuple[Array, Array]:
            log_p, log_q = log_softmaxes(x, y)
            both = log_p, log_q, *others
            return centred(f, log_p, mean[0], both), dot(centred(g, log_q, mean[1], both), y)

        return jnp.maximum(value, 0), gradient

    return by_classes


def _weight(below: Array, temperature: Scalar) -> Array:
    """exp(below / T), where `below` is a logit minus the largest.

    It is limited from below, because the derivative with respect to T at -inf would be 0 times infinity, which is NaN.
    """
    return jnp.exp(jnp.maximum(below, -1e5 * temperature) / temperature)


def difference(x: Array, y: Array) -> Array:
    """x - y, and 0 for a class that is at -inf in both, without a NaN in any intermediate result."""
    both = jnp.isneginf(x) & jnp.isneginf(y)
    return jnp.where(both, 0, jnp.where(both, 0, x) - jnp.where(both, 0, y))


def of_kept(
    divergence_and_gradient: Callable[..., tuple[Array, Array]], of_teacher: Callable[..., Array], bucket: bool
) -> ByClasses:
    """A divergence over the kept classes and, with `bucket`, one class for the rest, in blocks of classes.

    y is `values, indices, rest`; an index below 0 stands for no class. `of_teacher` is the gradient with respect to y.
    """

    def by_classes(
        over_classes: Callable[..., Any],
        rows: Array,
        values: Array,
        indices: Array,
        rest: Array,
        *settings: Any,
        class_axis_name: AxisName | None,
    ) -> tuple[Array, Callable[..., tuple[Array, Array]]]:
        temperature = settings[-1]
        lowest = jnp.finfo(rows.dtype).min

        def places(first: Any, x: Array) -> tuple[Array, Array]:
            """Which of the kept classes are in a block, and their positions in it, beyond its end for the others."""
            size = x.shape[-1]
            inside = (indices >= first) & (indices < first + size)
            return inside, jnp.where(inside, indices - first, size)

        def without(x: Array, at: Array) -> Array:
            return put(x, at, jnp.full(at.shape, -jnp.inf, x.dtype))

        def gather(sums: tuple[Array, Array, Array], first: Any, x: Array) -> tuple[Array, Array, Array]:
            own, peak, total = sums
            inside, at = places(first, x)
            own = jnp.where(inside, jnp.take_along_axis(x, jnp.where(inside, at, 0), axis=-1), own)
            others = without(x, at)
            new = jnp.maximum(peak, others.max(-1))
            weight = _weight(others - new[:, None], temperature)
            return own, new, _weight(peak - new, temperature) * total + weight.sum(-1)

        start = jnp.full_like(values, -jnp.inf), jnp.full_like(rows, lowest), jnp.zeros_like(rows)
        own, local_peak, total = over_classes(gather, start)
        peak = all_max(local_peak, class_axis_name)
        largest = jnp.maximum(class_max(own, class_axis_name)[:, 0], lowest)
        if bucket:
            largest = jnp.maximum(largest, peak)
            total = all_sum(_weight(local_peak - peak, temperature) * total, class_axis_name)
            total = jnp.where(total == 0, 1, total)
            others = jnp.where(peak == lowest, -jnp.inf, peak - largest) + temperature * jnp.log(total)
            others, rest = (on_first(z, class_axis_name, -jnp.inf) for z in (others[:, None], rest))
        # the largest is subtracted from each, because the logits of one may be far from those of the other
        student, teacher = own - largest[:, None], values
        if bucket:
            student, teacher = jnp.concatenate([student, others], -1), jnp.concatenate([values, rest], -1)
        teacher = teacher - jnp.maximum(class_max(teacher, class_axis_name), lowest)
        value, slope = divergence_and_gradient(student, teacher, *settings, class_axis_name=class_axis_name)
        pull = dot(of_teacher(student, teacher, *settings, class_axis_name=class_axis_name), teacher)
        of_rest = class_sum(slope[:, -1:], class_axis_name)

        def gradient(first: Any, x: Array) -> tuple[Array, Array]:
            at = places(first, x)[1]
            spread = jnp.zeros_like(x)
            if bucket:
                spread = _weight(without(x, at) - peak[:, None], temperature) * (of_rest / total[:, None])
            return put(spread, at, slope[:, : values.shape[-1]]), jnp.where(first == 0, pull, 0)  # of all classes

        return value, gradient

    return by_classes


@functools.partial(jnp.vectorize, signature="(n),(k),(k)->(n)")
def put(row: Array, places: Array, entries: Array) -> Array:
    """The row with these entries at these places; an entry beyond the end is dropped."""
    return row.at[places].set(entries, mode="drop")


def _logits(hidden: Array, weight: Array, bias: Array | None, output: Output, dtype: DTypeLike) -> Array:
    """The logits of hidden states, accumulated in `dtype` without a copy of the head in a wider dtype."""
    logits = _contracted(hidden, weight, 1, 1, dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype)[None]
    if output.scale is not None:
        logits = output.scale * logits
    if output.cap is not None:
        capped = output.cap * jnp.tanh(logits / output.cap)
        logits = capped if bias is None else jnp.where(jnp.isneginf(bias), -jnp.inf, capped)
    return logits


def _through(gradient: Array, logits: Array, output: Output) -> Array:
    """The gradient with respect to h · w + b, given the gradient with respect to the logits."""
    if output.cap is not None:  # a class at -inf has a gradient of 0
        gradient = gradient * (1 - (jnp.maximum(logits, -output.cap) / output.cap) ** 2)
    return gradient if output.scale is None else output.scale * gradient


def _contracted(a: Array, b: Array, axis: int, other: int, dtype: DTypeLike) -> Array:
    return jax.lax.dot_general(
        a, b, (((axis,), (other,)), ((), ())), precision=HIGHEST, preferred_element_type=jnp.dtype(dtype)
    )
