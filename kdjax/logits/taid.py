"""TAID: KL divergence to a target that moves from the student to the teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import (
    check_classes,
    fraction,
    less_log1p,
    of_largest,
    softmax,
    without_common_error,
)
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


@checked
def taid_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    interpolation: Scalar,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Temporally adaptive interpolated distillation: KL divergence to a target between the student and the teacher.

    $$\mathrm{KL}(m\,\|\,p),\qquad m=\mathrm{softmax}\big((1-\lambda)\bar s+\lambda t\big),\quad p=\mathrm{softmax}(s)$$

    where $\bar s$ are the student's logits, held constant.

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        interpolation: λ from 0 to 1, the position of the target between the student (0) and the teacher (1). It has no
            default: increase it during the training.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is never negative. It is 0 if student and teacher agree, and
        always for λ = 0. For λ = 1 it is `kl_loss` at temperature 1, and inf if the student gives -inf to a class that
        the teacher uses. For λ between 0 and 1, a class at -inf in either has probability 0 in the target.

    Raises:
        ValueError: an interpolation that is not between 0 and 1, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Shing, Misaki, Bao, Yokoi, Akiba, *TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge
    Transfer in Language Models*, ICLR 2025, https://arxiv.org/abs/2501.16937. The released code returns the
    cross-entropy of target and student, which has the same gradient p - m and is larger by the target's entropy. That
    entropy changes with λ and with the student, so the released value does not show whether the student follows the
    target. The released code adapts λ to that value; with this function you choose the schedule of λ yourself.

    >>> import jax.numpy as jnp
    >>> from kdjax import taid_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{taid_loss(s, t, interpolation=0.5):.4f}")
    0.0803
    """
    check_classes(student_logits)
    interpolation = fraction("interpolation", interpolation, student_logits, teacher_logits)
    return reduce(_taid(student_logits, teacher_logits, interpolation, where=where), where, reduction, axis_name)


def taid_and_gradient(x: jax.Array, y: jax.Array, interpolation: Scalar) -> tuple[jax.Array, jax.Array]:
    """KL(m || p), and its gradient p - m, where m is a constant.

    log(p / m) is computed from λ (x - y), so that it keeps its digits if λ is small, or if x and y are close.
    """
    p, own = softmax(x), jax.lax.stop_gradient(x)
    lowest, teacher_lowest = jnp.isneginf(own), jnp.isneginf(y)
    gap = jnp.where(lowest | teacher_lowest, 0, own) - jnp.where(lowest | teacher_lowest, 0, y)
    # exact at λ = 0 and at λ = 1; 0 times -inf counts as 0
    mixed = jnp.where(interpolation < 0.5, own - interpolation * gap, y + (1 - interpolation) * gap)
    absent = (lowest & (interpolation < 1)) | (teacher_lowest & (interpolation > 0))
    empty = teacher_lowest.all(-1, keepdims=True)  # not a distribution, even with weight 0
    m = softmax(jnp.where(empty, jnp.nan, jnp.where(absent, -jnp.inf, mixed)))
    # log(p / m), from the difference of the rows relative to the target's largest class, which keeps its digits
    still = jnp.where(lowest, 0, x) - jnp.where(lowest, 0, own)  # 0, but with the derivative of x
    apart = interpolation * (gap - of_largest(m.p, gap)) + (of_largest(m.p, own) - p.peak) + still
    apart = jnp.where(lowest & ~absent, -jnp.inf, jnp.where(absent & ~lowest, jnp.inf, apart))
    ratio, close = without_common_error(m.p, apart - (p.log_total - m.log_total))
    ratio = jnp.where(m.p == 0, 0, ratio)
    near = jnp.abs(ratio) < 1
    growth = jnp.expm1(jnp.where(near, ratio, 0))
    difference = jnp.where(close, m.p * growth, p.p - m.p)
    terms = jnp.where(near & (m.p > 0), m.p * less_log1p(growth), difference - m.p * ratio)
    value = terms.sum(-1)
    return jnp.where(value < 0, 0, value), difference


_taid = rowwise(taid_and_gradient)
