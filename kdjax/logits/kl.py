"""Kullback-Leibler divergence between teacher and student: Hinton's distillation, and its symmetric form."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._collectives import class_sum
from kdjax._numerics import (
    check_classes,
    difference_of_softmaxes,
    less_common_error,
    log_ratio,
    positive,
    pulled_back,
    times_square,
)
from kdjax._reduce import reduce
from kdjax._rowwise import kl_divergence, rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


@checked
def kl_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Knowledge distillation by KL divergence: the student's softened distribution should match the teacher's.

    $$T^2\,\mathrm{KL}(q\,\|\,p),\qquad p=\mathrm{softmax}(s/T),\quad q=\mathrm{softmax}(t/T)$$

    Args:
        student_logits: `[*batch, classes]`, with any leading axes, as in `[batch, tokens, vocabulary]`.
        teacher_logits: the same shape; constant.
        temperature: T > 0; an array has a gradient. The factor T² keeps the gradient's size as T grows.
        where: `[*batch]`, False for examples (or tokens) that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        class_axis_name: the mesh axis that the classes are spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree, never negative, and
        inf where the student gives -inf to a class that the teacher uses.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The second argument is constant, whichever model it comes from, so `kl_loss(teacher, student)` trains nothing. For
    the other direction, KL(p‖q), use `reverse_kl_loss`, and for the Jensen–Shannon divergence `jsd_loss`. Do not build
    the latter as `(kl_loss(m, t) + kl_loss(m, s)) / 2`, where m is the logarithm of the mean of the two softmaxes: the
    value is right, but the gradient is 0, because all of it goes through the second argument of `kl_loss(m, s)`.
    kdtorch warns once if a constant requires a gradient and the first argument does not.

    Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, https://arxiv.org/abs/1503.02531.
    Released codes differ in the factor T² and in the mean: PyTorch's `kl_div` averages over classes too, unless its
    reduction is `batchmean`. This function always includes T², and takes the mean over examples.

    >>> import jax.numpy as jnp
    >>> from kdjax import kl_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{kl_loss(s, t, temperature=2.0):.4f}")
    0.4095
    """
    check_classes(student_logits, class_axis_name, axis_name)
    temperature = positive("temperature", temperature, student_logits, teacher_logits)
    divergence = kl_divergence(
        student_logits, teacher_logits, temperature, where=where, class_axis_name=class_axis_name
    )
    return reduce(times_square(temperature, divergence), where, reduction, axis_name)


@checked
def symmetric_kl_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Symmetric KL divergence (Jeffreys), the mean of the two directions.

    $$\tfrac{T^2}{2}\left[\mathrm{KL}(q\,\|\,p)+\mathrm{KL}(p\,\|\,q)\right],\qquad
    p=\mathrm{softmax}(s/T),\quad q=\mathrm{softmax}(t/T)$$

    Args:
        student_logits: `[*batch, classes]`.
        teacher_logits: the same shape; constant.
        temperature: T > 0; an array has a gradient.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        class_axis_name: the mesh axis that the classes are spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where student and teacher agree, never negative, and
        inf where one of them gives -inf to a class that the other uses.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The README of the founding repository calls this SKLD; its code computes KL(q‖p) alone, averaged over batch and
    classes (`make_loss(..., conventions="founding")` gives that number).

    >>> import jax.numpy as jnp
    >>> from kdjax import symmetric_kl_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{symmetric_kl_loss(s, t):.4f}")
    0.3648
    """
    check_classes(student_logits, class_axis_name, axis_name)
    temperature = positive("temperature", temperature, student_logits, teacher_logits)
    divergence = _jeffreys(student_logits, teacher_logits, temperature, where=where, class_axis_name=class_axis_name)
    return reduce(times_square(temperature, divergence / 2), where, reduction, axis_name)


def jeffreys_and_gradient(
    x: jax.Array, y: jax.Array, temperature: Scalar, class_axis_name: AxisName | None = None
) -> tuple[jax.Array, jax.Array]:
    """sum (p - q) r with r = log(p / q), and its gradient [(p - q) + p (r - KL(p || q))] / T."""
    (p, *_), (q, *_), ratio = log_ratio(x, y, temperature, class_axis_name=class_axis_name)
    difference, _ = less_common_error(difference_of_softmaxes(p, q, ratio), q, class_axis_name)
    gradient = difference + pulled_back(ratio, p, class_axis_name)
    # terms are never negative, unless r has lost its digits
    terms = jnp.abs(jnp.where(difference == 0, 0, difference * ratio))
    return class_sum(terms, class_axis_name).squeeze(-1), gradient / temperature


_jeffreys = rowwise(jeffreys_and_gradient)
