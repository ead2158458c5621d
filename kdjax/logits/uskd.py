"""Universal self-knowledge distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._collectives import all_sum
from kdjax._numerics import (
    check_classes,
    cross_entropy,
    is_class,
    log_softmax,
    non_negative,
    promote,
    take_class,
    valid_index,
    weigh,
)
from kdjax._reduce import count, reduce, zero_masked
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
    r"""Universal self-knowledge distillation: soft labels made without a teacher, from the student and a weak head.

    $$-\alpha\sum_y P_y\log p_y\;-\;\beta\sum_{k\ne y}z_k\log\hat p_k\;-\;\mu\sum_k\left(0.9\,l_k+\tfrac{0.1}{C}\right)\log w_k$$

    p = softmax(student_logits), w = softmax(weak_logits), l the label's distribution, y its classes, the hat a softmax
    over the classes other than y.

    - P_y = l_y + p_y² − the batch mean of p_y², constant.
    - z: classes are ranked by $w_k/(1-\sum_y w_y+10^{-6})+\log p_k/(1-\sum_y\log p_y+10^{-6})$, the largest first and
      the first of equals first; z_k is 1/place (Zipf's law), renormalised over the classes other than y, constant.

    Args:
        student_logits: `[*batch, classes]`.
        weak_logits: `[*batch, classes]`, of a linear head on an intermediate feature; the third term trains it.
        labels: `[*batch]`, the class of each example (one outside `0 .. classes - 1` gives NaN for that example), or
            a distribution `[*batch, classes]` (mixup), whose two most probable classes are y; a second one of
            probability 0 is ignored, so that a one-hot distribution equals its class.
        alpha: weight of the target part, ≥ 0.
        beta: weight of the non-target part, ≥ 0.
        mu: weight of the weak head's own cross-entropy, ≥ 0.
        where: `[*batch]`, False for examples that count for nothing, in the batch mean too.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"`.
        axis_name: inside `shard_map`, the mesh axis that the batch is spread over; the mean over devices of what they
            return is then the loss of the whole batch.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a negative weight, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023,
    https://arxiv.org/abs/2303.13005. The paper ranks by probabilities; the released code, followed here, takes the
    logarithm of the student's. A class at -inf in both logits is padding: it has no place, and C does not count it.

    >>> import jax.numpy as jnp
    >>> from kdjax import uskd_loss
    >>> s, w = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{uskd_loss(s, w, jnp.array([0])):.4f}")
    0.2453
    """
    student, weak = zero_masked(where, *promote(student_logits, weak_logits))
    check_classes(student)
    alpha, beta = non_negative("alpha", alpha, student), non_negative("beta", beta, student)
    mu = non_negative("mu", mu, student)
    used = ~(jnp.isneginf(student) & jnp.isneginf(weak))
    log_p, log_w = log_softmax(student), log_softmax(weak)

    if labels.ndim < student.ndim:
        (labels,) = zero_masked(where, labels)
        labels, factor = valid_index(labels, student.shape[-1])
        factor = factor.astype(student.dtype)
        classes, probabilities = labels[None], jnp.ones_like(factor)[None]
        distribution = is_class(student, labels).astype(student.dtype)
    else:
        (distribution,) = zero_masked(where, labels.astype(student.dtype))
        first = jnp.argmax(distribution, -1)
        second = jnp.argmax(jnp.where(is_class(student, first), -jnp.inf, distribution), -1)
        classes = jnp.stack([first, second])
        probabilities = jnp.stack([take_class(distribution, first), take_class(distribution, second)])
        factor = jnp.ones_like(probabilities[0])

    present = probabilities > 0
    is_label = jnp.zeros(student.shape, bool)
    target = log_p_labels = w_labels = jnp.zeros_like(factor)
    for k in range(len(classes)):
        log_p_y = jnp.where(present[k], take_class(log_p, classes[k]), 0)
        counted = present[k] if where is None else present[k] & where
        square = jnp.where(counted, jnp.exp(2 * log_p_y), 0)
        mean = all_sum(jax.lax.stop_gradient(square.sum()), axis_name) / count(counted, square.dtype, axis_name)
        soft = jax.lax.stop_gradient(jnp.where(present[k], square + probabilities[k] - mean, 0))
        target -= soft * log_p_y
        log_p_labels += log_p_y
        w_labels += jnp.where(present[k], take_class(jnp.exp(log_w), classes[k]), 0)
        is_label |= is_class(student, classes[k]) & present[k][..., None]

    score = jnp.exp(log_w) / (1 - w_labels + 1e-6)[..., None] + log_p / (1 - log_p_labels + 1e-6)[..., None]
    zipf = jnp.where(used & ~is_label, _zipf(jax.lax.stop_gradient(score), where), 0)
    zipf /= jnp.maximum(zipf.sum(-1, keepdims=True), jnp.finfo(zipf.dtype).tiny)
    others = cross_entropy(jnp.where(is_label, -jnp.inf, student), zipf, 1.0)

    smooth = 0.9 * distribution + 0.1 / used.sum(-1, keepdims=True, dtype=student.dtype)
    head = cross_entropy(weak, jnp.where(used, smooth, 0), 1.0)
    return reduce(factor * (weigh(alpha, target) + weigh(beta, others) + weigh(mu, head)), where, reduction, axis_name)


def _zipf(score: jax.Array, where: jax.Array | None) -> jax.Array:
    """1 / the place of each class, 1 for the largest score; equal scores in the order of the classes.

    XLA sorts integers, alone, five times as fast as numbers with their places; a place is then where a class's own
    integer stands. Only three or more equal scores need the slow sort.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0, -score), f"int{8 * score.dtype.itemsize}")
    key = jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)  # in the order of -score
    ordered = jnp.sort(key, -1)
    threes = (ordered[..., 2:] == ordered[..., :-2]).any(-1)
    threes = (threes if where is None else threes & where).any()

    def own(ordered: jax.Array, key: jax.Array) -> jax.Array:
        place = jnp.searchsorted(ordered, key, method="scan_unrolled").astype("int32")
        index = jnp.arange(len(key), dtype="int32")
        first = jnp.full_like(index, len(key)).at[place].min(index)
        return place + (first[place] < index).astype("int32")

    def stable() -> jax.Array:
        place = jnp.argsort(jnp.argsort(-score, -1, stable=True), -1).astype("int32")
        return jnp.where(key == key, place, 0)  # argsort forgets, inside shard_map, that devices differ

    place = jax.lax.cond(threes, stable, lambda: jnp.vectorize(own, signature="(n),(n)->(n)")(ordered, key))
    return 1 / (1 + place).astype(score.dtype)
