"""Universal self-knowledge distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._collectives import all_sum
from kdjax._numerics import (
    Softmax,
    check_classes,
    check_fixed,
    cross_entropy_and_gradient,
    cross_entropy_of_softmax,
    is_class,
    non_negative,
    promote,
    softmax,
    valid_index,
    weigh,
    widest,
)
from kdjax._reduce import reduce, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Integer, Reduction, Scalar, checked


@checked
def uskd_loss(
    student_logits: Float[Array, "*batch classes"],
    weak_logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 0.1,
    mu: Scalar = 0.005,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Universal self-knowledge distillation: soft labels without a teacher, from the student and a weak head.

    $$-\alpha\sum_y P_y\log p_y\;-\;\beta\sum_{k\ne y}z_k\log\hat p_k\;-\;\mu\sum_k\left(0.9\,l_k+\tfrac{0.1}{C}\right)\log w_k$$

    p = softmax(student_logits), w = softmax(weak_logits), l the label's distribution, y its classes, the hat a softmax
    over the classes other than y.

    - P_y = l_y + p_y² − the batch mean of p_y², constant.
    - z: the classes are ranked by $w_k/(1-\sum_y w_y+10^{-6})+\log p_k/(1-\sum_y\log p_y+10^{-6})$, the largest first,
      and equal ones in the order of the classes; z_k is 1/place (Zipf's law), normalised over the classes other than y,
      and constant.

    Args:
        student_logits: `[*batch, classes]`.
        weak_logits: `[*batch, classes]`, of a linear head on an intermediate feature; the third term trains it.
        labels: `[*batch]`, the class of each example (one outside `0 .. classes - 1` gives NaN for that example), or
            a distribution `[*batch, classes]` (mixup), whose two most probable classes are y; a second one of
            probability 0 is ignored, so that a one-hot distribution equals its class.
        alpha: weight of the target part, ≥ 0; a constant.
        beta: weight of the non-target part, ≥ 0; a constant.
        mu: weight of the weak head's own cross-entropy, ≥ 0; a constant.
        where: `[*batch]`, False for examples that are left out, also of the batch mean.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a negative weight, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023,
    https://arxiv.org/abs/2303.13005. The paper ranks by probabilities; the released code, which this function follows,
    uses the logarithm of the student's. A class at -inf in both logits is padding: it is not ranked, and C does not
    count it.

    >>> import jax.numpy as jnp
    >>> from kdjax import uskd_loss
    >>> s, w = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{uskd_loss(s, w, jnp.array([0])):.4f}")
    0.2453
    """
    check_fixed("uskd_loss", **{"last axis": student_logits.shape[-1]})
    check_classes(student_logits)
    logits = student_logits, weak_logits
    alpha, beta = non_negative("alpha", alpha, *logits), non_negative("beta", beta, *logits)
    mu = non_negative("mu", mu, *logits)
    dtype = widest(*logits)

    (kept,) = zero_masked(where, labels)
    if labels.ndim < student_logits.ndim:
        labels, factor = valid_index(kept, student_logits.shape[-1])
        classes, factor = labels[..., None], factor.astype(dtype)
        probabilities = jnp.ones_like(classes, dtype)
    else:
        first = jnp.argmax(kept, -1)
        second = jnp.argmax(jnp.where(is_class(kept, first), -jnp.inf, kept), -1)
        classes = jnp.stack([first, second], -1)
        probabilities = jnp.take_along_axis(kept, classes, -1).astype(dtype)
        classes = jnp.where(
            probabilities > 0, classes, first[..., None]
        )  # a second label of probability 0 is replaced by the first
        factor = jnp.ones_like(probabilities[..., 0])

    (student,) = zero_masked(where, *promote(jax.lax.stop_gradient(student_logits)))
    p = softmax(student)
    log_p = jnp.take_along_axis(student, classes, -1) - p.peak - p.log_total
    present = probabilities > 0
    counted = (present if where is None else present & where[..., None]) & ~jnp.isnan(log_p)
    square = jnp.where(present, jnp.exp(2 * log_p), 0)
    examples = tuple(range(square.ndim - 1))
    number = jnp.maximum(all_sum(counted.sum(examples, dtype=dtype), axis_name), 1)
    mean = all_sum(jnp.where(counted, square, 0).sum(examples), axis_name) / number
    mean = jnp.broadcast_to(mean, square.shape)
    soft = jnp.where(present, square + probabilities - mean, 0)

    value = _target_and_others(*logits, classes, probabilities, soft, alpha, beta, where=where)
    head = _head(*logits[::-1], labels, where=where)
    return reduce(factor * (value + weigh(mu, head)), where, reduction, axis_name)


def target_and_others_and_gradient(
    x: jax.Array,
    weak: jax.Array,
    classes: jax.Array,
    probabilities: jax.Array,
    soft: jax.Array,
    alpha: Scalar,
    beta: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """-a sum P_y log p_y - b sum z log ^p, and its gradient a (p sum P - P) + b (^p sum z - z)."""
    p = softmax(x)
    at_labels = is_class(x[..., None, :], classes)
    log_p, unused = x - p.peak - p.log_total, jnp.isneginf(x) & jnp.isneginf(weak)
    excluded = at_labels.any(-2)
    zipf = _zipf(
        jax.lax.stop_gradient(log_p), softmax(jax.lax.stop_gradient(weak)), unused | excluded, classes, probabilities
    )
    log_p_y = jnp.take_along_axis(log_p, classes, -1)
    target = -jnp.where(soft == 0, 0, soft * jnp.where(soft == 0, 0, log_p_y)).sum(-1)
    hat_p = softmax(jnp.where(excluded, -jnp.inf, x), may_be_empty=True)
    others, gradient = cross_entropy_of_softmax(hat_p, x, zipf, 1.0)
    pushed = p.p * soft.sum(-1, keepdims=True) - jnp.where(at_labels, soft[..., None], 0).sum(-2)
    return weigh(alpha, target) + weigh(beta, others), alpha * pushed + beta * gradient


_target_and_others = rowwise(target_and_others_and_gradient)


def _zipf(log_p: jax.Array, w: Softmax, excluded: jax.Array, classes: jax.Array, probabilities: jax.Array) -> jax.Array:
    """z: 1 / the rank of each class by its score, 0 for labels and padding, normalised to sum 1."""
    present = probabilities > 0
    over_w, over_p = (
        1 - jnp.where(present, jnp.take_along_axis(x, classes, -1), 0).sum(-1, keepdims=True) + 1e-6
        for x in (w.p, log_p)
    )
    zipf = jnp.where(excluded, 0, _inverse_places(w.p / over_w + log_p / over_p))
    felt = 0 * w.log_total  # carries a NaN, which the ranks do not show
    return zipf / (jnp.maximum(zipf.sum(-1, keepdims=True), jnp.finfo(zipf.dtype).tiny) + felt)


def _inverse_places(score: jax.Array) -> jax.Array:
    """1 / the rank of each class, 1 for the largest score; equal scores are ranked in the order of the classes.

    This is a radix sort: the bits of the scores are sorted in parts, the lowest part first. Each part is packed into
    one integer with the class's position so far, which keeps equal parts in order. XLA on a CPU sorts such integers
    five times as fast as numbers with their indices.
    """
    bits, size = 8 * score.dtype.itemsize, score.shape[-1]
    keys = jax.lax.bitcast_convert_type(0 - score, f"uint{bits}")
    sign = jnp.array(1, keys.dtype) << (bits - 1)
    keys = jnp.where(keys < sign, keys | sign, ~keys)  # in the order of -score
    of_place = (size - 1).bit_length()
    of_part = bits - of_place
    places = order = jax.lax.broadcasted_iota(keys.dtype, keys.shape, keys.ndim - 1)
    for _ in range(0, bits, of_part):
        before = (jnp.sort(keys << of_place | places, -1) & (2**of_place - 1)).astype("int32")
        keys, order = (jnp.take_along_axis(x, before, -1) for x in (keys >> of_part, order))
    weight = 1 / jnp.arange(1, size + 1, dtype=score.dtype)
    put = jnp.vectorize(lambda order: weight.at[order].set(weight, unique_indices=True), signature="(n)->(n)")
    return put(order.astype("int32"))


def head_and_gradient(weak: jax.Array, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-sum (0.9 l + 0.1 / C) log softmax(weak), over the classes that are not padding."""
    used = ~(jnp.isneginf(x) & jnp.isneginf(weak))
    distribution = is_class(weak, labels).astype(weak.dtype) if labels.ndim < weak.ndim else labels
    # NaN if x is all -inf
    number = used.sum(-1, keepdims=True, dtype=weak.dtype) + 0 * jax.lax.stop_gradient(x).max(-1, keepdims=True)
    return cross_entropy_and_gradient(weak, jnp.where(used, 0.9 * distribution + 0.1 / number, 0))


_head = rowwise(head_and_gradient)
