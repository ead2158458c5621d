"""Universal logit distillation: compares distributions over different vocabularies in sorted order."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from kdjax._numerics import check_classes, softmaxes
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked


@checked
def uld_loss(
    student_logits: Float[Array, "*batch student_classes"],
    teacher_logits: Float[Array, "*batch teacher_classes"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Universal logit distillation (ULD): the sorted probabilities of student and teacher should match.

    $$\sum_k\left|p_{(k)}-q_{(k)}\right|,\qquad p=\mathrm{softmax}(s),\quad q=\mathrm{softmax}(t)$$

    where (k) is the k-th place in descending order, and the shorter of the two is padded with zeros. The loss ignores
    which class has which probability, so student and teacher may have different vocabularies.

    Args:
        student_logits: `[*batch, student_classes]`.
        teacher_logits: `[*batch, teacher_classes]`, of any number of classes; constant.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is between 0 and 2, and 0 where the teacher's classes are a
        permutation of the student's. A class at -inf has probability 0, so padding student or teacher with -inf changes
        nothing.

    Raises:
        ValueError: fewer than 2 classes on either side, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Boizard et al., *Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs*, TMLR 2025,
    https://arxiv.org/abs/2402.12030. The logits are sorted stably instead of the probabilities, because rounding may
    make probabilities equal. If the two probabilities at one place are equal, the gradient of their difference is 0.

    >>> import jax.numpy as jnp
    >>> from kdjax import uld_loss
    >>> s = jnp.array([[2.0, 0.0, -1.0]])
    >>> t = jnp.array([[1.0, 0.0, 1.0, -1.0]])
    >>> print(f"{uld_loss(s, t):.4f}")
    0.8886
    """
    check_classes(student_logits)
    check_classes(teacher_logits)
    return reduce(_sorted_distance(student_logits, teacher_logits, where=where), where, reduction, axis_name)


def uld_and_gradient(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum |p - q| of the sorted softmaxes, and its gradient p (h - sum p h), with h = sign(p - q) in the order of x."""
    order = _order(_keys(x))
    ours, theirs = jnp.take_along_axis(x, order, axis=-1), _descending(y)
    missing = x.shape[-1] - y.shape[-1]
    ours, theirs = (_filled(ours, -missing), _filled(theirs, missing))
    p, _, gap = softmaxes(ours, theirs)
    # rows that differ by a constant have equal softmaxes, but rounding makes them differ by this much
    gap = jnp.where(jnp.abs(gap) <= jnp.finfo(x.dtype).eps ** 1.5 * p, 0, gap)
    signs = jnp.sign(gap)
    signs = signs - signs[..., :1]  # no effect on the gradient, but fewer digits lost at a p of almost 1
    gradient = (p * (signs - (p * signs).sum(-1, keepdims=True)))[..., : x.shape[-1]]
    return jnp.abs(gap).sum(-1), _put_back(gradient, order)


def _keys(x: jax.Array) -> jax.Array:
    """Integers whose ascending order is the descending order of x; XLA on a CPU sorts them four times as fast."""
    integer = jnp.int64 if x.dtype.itemsize == 8 else jnp.int32
    x = jnp.where(x == 0, 0, jax.lax.stop_gradient(x))  # -0 becomes 0
    bits = jax.lax.bitcast_convert_type(x, integer)
    return ~jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


def _descending(x: jax.Array) -> jax.Array:
    """x in descending order, without a gradient."""
    keys = ~jax.lax.sort(_keys(x), is_stable=False)
    return jax.lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ jnp.iinfo(keys.dtype).max, keys), x.dtype)


def _order(keys: jax.Array) -> jax.Array:
    """The indices that sort the keys in ascending order, stably."""
    if keys.dtype.itemsize == 8 or is_symbolic_dim(keys.shape[-1]):
        return _argsort(keys)
    return jax.lax.platform_dependent(keys, cpu=_by_digits, default=_argsort)


def _argsort(keys: jax.Array) -> jax.Array:
    return jnp.argsort(keys, -1, stable=True).astype(jnp.int32)


def _by_digits(keys: jax.Array) -> jax.Array:
    """The same by a radix sort from the lowest digit, with each digit and its position packed into one integer."""
    unsigned = jax.lax.bitcast_convert_type(keys, jnp.uint32) ^ jnp.uint32(1 << 31)
    places = jax.lax.broadcasted_iota(jnp.uint32, keys.shape, keys.ndim - 1)
    bits = max((keys.shape[-1] - 1).bit_length(), 1)
    order = places.astype(jnp.int32)
    for low in range(0, 32, 32 - bits):
        digit = jnp.take_along_axis(unsigned, order, axis=-1) >> low
        place = jax.lax.sort(digit << bits | places, is_stable=False) & ((1 << bits) - 1)
        order = jnp.take_along_axis(order, place.astype(jnp.int32), axis=-1)
    return order


def _filled(x: jax.Array, missing: int) -> jax.Array:
    """The row padded with classes of probability 0, if some are missing."""
    if is_symbolic_dim(missing) or missing > 0:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    return x


@functools.partial(jnp.vectorize, signature="(n),(n)->(n)")
def _put_back(row: jax.Array, order: jax.Array) -> jax.Array:
    """The entries of a sorted row, moved back to their original places."""
    return jnp.zeros_like(row).at[order].set(row, unique_indices=True)


_sorted_distance = rowwise(uld_and_gradient)
