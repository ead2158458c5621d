"""Reverse Kullback-Leibler divergence: the student against the teacher, as MiniLLM trains."""

from __future__ import annotations

import jax

from kdjax._numerics import check_classes, kl_of_softmaxes, log_ratio, positive, pulled_back, times_square
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


@checked
def reverse_kl_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Knowledge distillation by the reverse KL divergence: the student puts no probability where the teacher has none.

    $$T^2\,\mathrm{KL}(p\,\|\,q),\qquad p=\mathrm{softmax}(s/T),\quad q=\mathrm{softmax}(t/T)$$

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
        inf where the teacher gives -inf to a class that the student uses; the gradient stays finite there. A class to
        which the student gives -inf adds nothing.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024, https://arxiv.org/abs/2306.08543.
    The paper samples from the student; the released codes of DistiLLM and torchtune sum over the vocabulary, as this
    function does, without a temperature. Both have a gradient of NaN if any logit is -inf.

    >>> import jax.numpy as jnp
    >>> from kdjax import reverse_kl_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> print(f"{reverse_kl_loss(s, t, temperature=2.0):.4f}")
    0.3851
    """
    check_classes(student_logits, class_axis_name, axis_name)
    temperature = positive("temperature", temperature, student_logits, teacher_logits)
    divergence = reverse_kl_divergence(
        student_logits, teacher_logits, temperature, where=where, class_axis_name=class_axis_name
    )
    return reduce(times_square(temperature, divergence), where, reduction, axis_name)


def reverse_kl_and_gradient(
    x: jax.Array, y: jax.Array, temperature: Scalar, class_axis_name: AxisName | None = None
) -> tuple[jax.Array, jax.Array]:
    """KL(p || q), and its gradient p (r - KL(p || q)) / T with r = log(p / q)."""
    p, q, ratio = log_ratio(x, y, temperature, class_axis_name=class_axis_name)
    value, _ = kl_of_softmaxes(q, p, -ratio, class_axis_name)
    return value, pulled_back(ratio, p.p, class_axis_name) / temperature


reverse_kl_divergence = rowwise(reverse_kl_and_gradient)
