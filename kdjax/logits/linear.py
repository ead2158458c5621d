"""Divergences of the logits of two linear heads, which never are in memory as a whole."""

from __future__ import annotations

import math

import jax

from kdjax._linear import Fixed, Student, linear
from kdjax._numerics import check_fixed, fraction, kl_and_gradient, positive, times_square
from kdjax._reduce import check_reduction, reduce, reduce_sum
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked
from kdjax.logits.jsd import jsd_and_gradient
from kdjax.logits.reverse_kl import reverse_kl_and_gradient


@checked
def linear_kl_loss(
    student_hidden: Float[Array, "*batch student_dim"],
    student_weight: Float[Array, "classes student_dim"],
    teacher_hidden: Float[Array, "*batch teacher_dim"],
    teacher_weight: Float[Array, "classes teacher_dim"],
    student_bias: Float[Array, "classes"] | None = None,
    teacher_bias: Float[Array, "classes"] | None = None,
    *,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""KL divergence of hidden states through two linear heads: `kl_loss` of hidden·weightᵀ + bias.

    $$T^2\,\mathrm{KL}(q\,\|\,p),\qquad p=\mathrm{softmax}\big((W_s h_s+b_s)/T\big),\quad
    q=\mathrm{softmax}\big((W_t h_t+b_t)/T\big)$$

    The logits are made for a block of rows at a time and dropped, so that what is held does not grow with rows ×
    vocabulary. A frozen head costs no gradient.

    Args:
        student_hidden: `[*batch, student_dim]`, with any leading axes, as in `[batch, tokens, student_dim]`.
        student_weight: the student's head, `[vocabulary, student_dim]`; half precision is multiplied as it is.
        teacher_hidden: `[*batch, teacher_dim]`; constant.
        teacher_weight: the teacher's head, `[vocabulary, teacher_dim]`; constant.
        student_bias: `[vocabulary]`, added to the student's logits.
        teacher_bias: `[vocabulary]`, added to the teacher's; constant.
        temperature: T > 0; an array has a gradient.
        where: `[*batch]`, False for examples (or tokens) that are left out. They add nothing to any gradient.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`, as `kl_loss` of the logits. A scalar makes its gradients in the
        forward pass and holds those of the hidden states, the head and the bias alone. With `"none"` the inputs are held,
        and the backward pass makes the logits again. There is one derivative, by reverse mode.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit, as of vocabularies that differ.

    Hsu et al., *Liger Kernel: Efficient Triton Kernels for LLM Training*, 2024, https://arxiv.org/abs/2410.10989, fuses the
    head with the divergence in the same way, and fills a smaller student's vocabulary up with logits of 0, which take
    probability.

    >>> import jax.numpy as jnp
    >>> from kdjax import kl_loss, linear_kl_loss
    >>> h, w = jnp.array([[1.0, -1.0]]), jnp.array([[2.0, 0.0], [1.0, 1.0]])
    >>> g, v = jnp.array([[0.5]]), jnp.array([[2.0], [0.0]])
    >>> print(f"{linear_kl_loss(h, w, g, v):.4f}")
    0.0826
    >>> print(f"{kl_loss(h @ w.T, g @ v.T):.4f}")
    0.0826
    """
    check_fixed("linear_kl_loss", batch=math.prod(student_hidden.shape[:-1]), vocabulary=student_weight.shape[0])
    temperature = _checked(student_hidden, student_weight, teacher_hidden, teacher_weight, temperature)
    student = Student(student_hidden, student_weight, student_bias, temperature)
    fixed = Fixed(teacher_hidden, teacher_weight, teacher_bias, where)
    value = _kl(student, fixed, summed=reduction != "none")
    return _reduced(times_square(temperature, value), student_hidden, where, reduction, axis_name)


@checked
def linear_jsd_loss(
    student_hidden: Float[Array, "*batch student_dim"],
    student_weight: Float[Array, "classes student_dim"],
    teacher_hidden: Float[Array, "*batch teacher_dim"],
    teacher_weight: Float[Array, "classes teacher_dim"],
    student_bias: Float[Array, "classes"] | None = None,
    teacher_bias: Float[Array, "classes"] | None = None,
    *,
    beta: float = 0.5,
    temperature: Scalar = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Generalised Jensen-Shannon divergence through two linear heads: `jsd_loss` of hidden·weightᵀ + bias.

    $$\beta\,\mathrm{KL}(q\,\|\,m)+(1-\beta)\,\mathrm{KL}(p\,\|\,m),\qquad m=\beta q+(1-\beta)p,\quad
    p=\mathrm{softmax}\big((W_s h_s+b_s)/T\big),\; q=\mathrm{softmax}\big((W_t h_t+b_t)/T\big)$$

    The logits are made for a block of rows at a time and dropped, so that what is held does not grow with rows ×
    vocabulary. A frozen head costs no gradient.

    Args:
        student_hidden: `[*batch, student_dim]`, with any leading axes, as in `[batch, tokens, student_dim]`.
        student_weight: the student's head, `[vocabulary, student_dim]`; half precision is multiplied as it is.
        teacher_hidden: `[*batch, teacher_dim]`; constant.
        teacher_weight: the teacher's head, `[vocabulary, teacher_dim]`; constant.
        student_bias: `[vocabulary]`, added to the student's logits.
        teacher_bias: `[vocabulary]`, added to the teacher's; constant.
        beta: β from 0 to 1, the teacher's part of the mixture, a Python number. At 0 the loss is KL(q‖p), at 1 KL(p‖q).
        temperature: T > 0; an array has a gradient.
        where: `[*batch]`, False for examples (or tokens) that are left out. They add nothing to any gradient.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`, as `jsd_loss` of the logits, without a factor T². What is held is
        what `linear_kl_loss` holds.

    Raises:
        ValueError: a β that is not between 0 and 1, a temperature that is not positive, fewer than 2 classes, an unknown
            reduction.
        TypeError: a shape or dtype that does not fit, as of vocabularies that differ.

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024,
    https://arxiv.org/abs/2306.13649, with the head inside, as in *Liger Kernel*, Hsu et al., 2024,
    https://arxiv.org/abs/2410.10989.

    >>> import jax.numpy as jnp
    >>> from kdjax import jsd_loss, linear_jsd_loss
    >>> h, w = jnp.array([[1.0, -1.0]]), jnp.array([[2.0, 0.0], [1.0, 1.0]])
    >>> g, v = jnp.array([[0.5]]), jnp.array([[2.0], [0.0]])
    >>> print(f"{linear_jsd_loss(h, w, g, v):.4f}")
    0.0183
    >>> print(f"{jsd_loss(h @ w.T, g @ v.T):.4f}")
    0.0183
    """
    check_fixed("linear_jsd_loss", batch=math.prod(student_hidden.shape[:-1]), vocabulary=student_weight.shape[0])
    temperature = _checked(student_hidden, student_weight, teacher_hidden, teacher_weight, temperature)
    weight = fraction("beta", beta, student_hidden, teacher_hidden)
    student = Student(student_hidden, student_weight, student_bias, temperature)
    fixed = Fixed(teacher_hidden, teacher_weight, teacher_bias, where)
    if weight == 0:
        value = _kl(student, fixed, summed=reduction != "none")
    elif weight == 1:
        value = _reverse_kl(student, fixed, summed=reduction != "none")
    else:
        value = _jsd(student, fixed._replace(settings=(weight,)), summed=reduction != "none")
    return _reduced(value, student_hidden, where, reduction, axis_name)


def _checked(hidden: Array, weight: Array, teacher_hidden: Array, teacher_weight: Array, temperature: Scalar) -> Scalar:
    """The temperature, if there are two classes."""
    if weight.shape[0] < 2:
        raise ValueError(
            f"`student_weight` must have at least 2 classes on its first axis, got shape {list(weight.shape)}"
        )
    return positive("temperature", temperature, hidden, weight, teacher_hidden, teacher_weight)


def _reduced(
    value: jax.Array, hidden: Array, where: Array | None, reduction: Reduction, axis_name: AxisName | None
) -> jax.Array:
    if reduction == "none":
        return reduce(value, where, reduction, axis_name)
    check_reduction(reduction)
    return reduce_sum(value, math.prod(hidden.shape[:-1]), where, reduction, axis_name)


_kl = linear(kl_and_gradient, lambda x, y, t: reverse_kl_and_gradient(y, x, t)[1])
_reverse_kl = linear(reverse_kl_and_gradient, lambda x, y, t: kl_and_gradient(y, x, t)[1])
_jsd = linear(jsd_and_gradient, lambda x, y, beta, t: jsd_and_gradient(y, x, 1 - beta, t)[1])
