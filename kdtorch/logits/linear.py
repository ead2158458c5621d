"""Divergences between the logits of linear heads, which are never in memory as a whole."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from kdtorch._collectives import class_range, on_first
from kdtorch._linear import Divergence, Fixed, Output, Student, linear, of_heads, of_kept
from kdtorch._numerics import dot, fraction, kl_and_gradient, positive, scalar, times_square
from kdtorch._reduce import check_reduction, reduce, reduce_sum, weighted_mean
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked, sizes
from kdtorch.logits.jsd import jsd_and_gradient
from kdtorch.logits.reverse_kl import reverse_kl_and_gradient
from kdtorch.logits.topk_kl import kept_and_rest, recorded, topk_and_gradient

Memory = Literal["low", "least"]


@checked(learns=("student_hidden", "student_weight", "student_bias", "temperature"))
def linear_kl_loss(
    student_hidden: Float[Tensor, "*batch student_dim"],
    student_weight: Float[Tensor, "classes student_dim"],
    teacher_hidden: Float[Tensor, "*batch teacher_dim"],
    teacher_weight: Float[Tensor, "classes teacher_dim"],
    student_bias: Float[Tensor, "classes"] | None = None,
    teacher_bias: Float[Tensor, "classes"] | None = None,
    *,
    temperature: Scalar = 1.0,
    student_scale: Scalar = 1.0,
    teacher_scale: Scalar = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    weights: Float[Tensor, "*batch"] | None = None,
    memory: Memory = "low",
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    class_group: ProcessGroup | None = None,
) -> Tensor:
    r"""KL divergence of hidden states through two linear heads: `kl_loss` of hidden·weightᵀ + bias.

    $$T^2\,\mathrm{KL}(q\,\|\,p),\qquad p=\mathrm{softmax}\big((W_s h_s+b_s)/T\big),\quad
    q=\mathrm{softmax}\big((W_t h_t+b_t)/T\big)$$

    The logits are computed one block at a time and not stored, so the memory does not grow with rows × vocabulary. A
    frozen head needs no memory for its gradient.

    Args:
        student_hidden: `[*batch, student_dim]`, with any leading axes, as in `[batch, tokens, student_dim]`.
        student_weight: the student's head, `[vocabulary, student_dim]`; half precision is multiplied without a conversion.
        teacher_hidden: `[*batch, teacher_dim]`; constant.
        teacher_weight: the teacher's head, `[vocabulary, teacher_dim]`; constant.
        student_bias: `[vocabulary]`, added to the student's logits.
        teacher_bias: `[vocabulary]`, added to the teacher's; constant.
        temperature: T > 0; a tensor has a gradient.
        student_scale: a number greater than 0 that the student's logits are multiplied by, such as Cohere's `logit_scale`.
        teacher_scale: the same for the teacher.
        softcap: c, for c·tanh(logits / c) of the scaled logits, as in Gemma 2: one number for both heads, or a pair for student
            and teacher, such as `(None, 30.0)`. A class whose bias is -inf stays excluded.
        weights: `[*batch]`, a factor for the value of each example (or token); constant. The mean is then the sum of
            weight times value over the kept examples, divided by the sum of their weights, as in PyTorch's
            `cross_entropy` with class weights. A weight of 0 leaves the example out.
        memory: `"low"`, or `"least"` for smaller blocks of logits, of a few classes each, in two passes over the
            classes. This takes longer and needs less memory.
        where: `[*batch]`, False for examples (or tokens) that are left out. They contribute nothing to any gradient.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.
        class_group: the process group that the classes are spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`, as `kl_loss` of the logits. For a scalar, the
        forward pass computes the gradients of the hidden states, the head and the bias, and stores nothing else. With
        `"none"` the inputs are stored, and the backward pass computes the logits again. There are only first derivatives,
        in reverse mode.

    Raises:
        ValueError: a temperature, scale or softcap that is not positive, fewer than 2 classes, an unknown reduction or
            `memory`.
        TypeError: a shape or dtype that does not fit, for example vocabularies that differ.

    Hsu et al., *Liger Kernel: Efficient Triton Kernels for LLM Training*, 2024, https://arxiv.org/abs/2410.10989, fuses the
    head with the divergence in the same way. It fills a smaller vocabulary of a student up with logits of 0, which take
    probability.

    >>> import torch
    >>> from kdtorch import kl_loss, linear_kl_loss
    >>> h, w = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    >>> g, v = torch.tensor([[0.5]]), torch.tensor([[2.0], [0.0]])
    >>> print(f"{linear_kl_loss(h, w, g, v):.4f}")
    0.0826
    >>> print(f"{kl_loss(h @ w.T, g @ v.T):.4f}")
    0.0826
    """
    least = _least(memory)
    _classes(student_hidden, student_weight, class_group, group)
    temperature = positive("temperature", temperature, student_weight, student_hidden, teacher_hidden, teacher_weight)
    outputs = _outputs(softcap, student_scale, teacher_scale, student_hidden)
    student = _student(student_hidden, student_weight, student_bias, temperature)
    fixed = Fixed((teacher_hidden,), teacher_weight, teacher_bias, where, weights, outputs)
    value = _kl(student, fixed, summed=reduction != "none", least=least, class_group=class_group)
    return _reduced(times_square(temperature, value), student_hidden, weights, where, reduction, group)


@checked(learns=("student_hidden", "student_weight", "student_bias", "temperature"))
def linear_reverse_kl_loss(
    student_hidden: Float[Tensor, "*batch student_dim"],
    student_weight: Float[Tensor, "classes student_dim"],
    teacher_hidden: Float[Tensor, "*batch teacher_dim"],
    teacher_weight: Float[Tensor, "classes teacher_dim"],
    student_bias: Float[Tensor, "classes"] | None = None,
    teacher_bias: Float[Tensor, "classes"] | None = None,
    *,
    temperature: Scalar = 1.0,
    student_scale: Scalar = 1.0,
    teacher_scale: Scalar = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    weights: Float[Tensor, "*batch"] | None = None,
    memory: Memory = "low",
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    class_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Reverse KL divergence through two linear heads: `reverse_kl_loss` of hidden·weightᵀ + bias.

    $$T^2\,\mathrm{KL}(p\,\|\,q),\qquad p=\mathrm{softmax}\big((W_s h_s+b_s)/T\big),\quad
    q=\mathrm{softmax}\big((W_t h_t+b_t)/T\big)$$

    The logits are computed one block at a time and not stored, so the memory does not grow with rows × vocabulary. A
    frozen head needs no memory for its gradient.

    Args:
        student_hidden: `[*batch, student_dim]`, with any leading axes, as in `[batch, tokens, student_dim]`.
        student_weight: the student's head, `[vocabulary, student_dim]`; half precision is multiplied without a conversion.
        teacher_hidden: `[*batch, teacher_dim]`; constant.
        teacher_weight: the teacher's head, `[vocabulary, teacher_dim]`; constant.
        student_bias: `[vocabulary]`, added to the student's logits.
        teacher_bias: `[vocabulary]`, added to the teacher's; constant.
        temperature: T > 0; a tensor has a gradient.
        student_scale: a number greater than 0 that the student's logits are multiplied by, such as Cohere's `logit_scale`.
        teacher_scale: the same for the teacher.
        softcap: c, for c·tanh(logits / c) of the scaled logits, as in Gemma 2: one number for both heads, or a pair for student
            and teacher, such as `(None, 30.0)`. A class whose bias is -inf stays excluded.
        weights: `[*batch]`, a factor for the value of each example (or token); constant. The mean is then the sum of
            weight times value over the kept examples, divided by the sum of their weights, as in PyTorch's
            `cross_entropy` with class weights. A weight of 0 leaves the example out.
        memory: `"low"`, or `"least"` for smaller blocks of logits, of a few classes each, in two passes over the
            classes. This takes longer and needs less memory.
        where: `[*batch]`, False for examples (or tokens) that are left out. They contribute nothing to any gradient.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.
        class_group: the process group that the classes are spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`, as `reverse_kl_loss` of the logits. It stores the same
        tensors as `linear_kl_loss`.

    Raises:
        ValueError: a temperature, scale or softcap that is not positive, fewer than 2 classes, an unknown reduction or
            `memory`.
        TypeError: a shape or dtype that does not fit, for example vocabularies that differ.

    Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024, https://arxiv.org/abs/2306.08543,
    with the head inside, as in *Liger Kernel*, Hsu et al., 2024, https://arxiv.org/abs/2410.10989.

    >>> import torch
    >>> from kdtorch import reverse_kl_loss, linear_reverse_kl_loss
    >>> h, w = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    >>> g, v = torch.tensor([[0.5]]), torch.tensor([[2.0], [0.0]])
    >>> print(f"{linear_reverse_kl_loss(h, w, g, v):.4f}")
    0.0671
    >>> print(f"{reverse_kl_loss(h @ w.T, g @ v.T):.4f}")
    0.0671
    """
    least = _least(memory)
    _classes(student_hidden, student_weight, class_group, group)
    temperature = positive("temperature", temperature, student_weight, student_hidden, teacher_hidden, teacher_weight)
    outputs = _outputs(softcap, student_scale, teacher_scale, student_hidden)
    student = _student(student_hidden, student_weight, student_bias, temperature)
    fixed = Fixed((teacher_hidden,), teacher_weight, teacher_bias, where, weights, outputs)
    value = _reverse_kl(student, fixed, summed=reduction != "none", least=least, class_group=class_group)
    return _reduced(times_square(temperature, value), student_hidden, weights, where, reduction, group)


@checked(learns=("student_hidden", "student_weight", "student_bias", "temperature"))
def linear_jsd_loss(
    student_hidden: Float[Tensor, "*batch student_dim"],
    student_weight: Float[Tensor, "classes student_dim"],
    teacher_hidden: Float[Tensor, "*batch teacher_dim"],
    teacher_weight: Float[Tensor, "classes teacher_dim"],
    student_bias: Float[Tensor, "classes"] | None = None,
    teacher_bias: Float[Tensor, "classes"] | None = None,
    *,
    beta: float = 0.5,
    temperature: Scalar = 1.0,
    student_scale: Scalar = 1.0,
    teacher_scale: Scalar = 1.0,
    softcap: float | tuple[float | None, float | None] | None = None,
    weights: Float[Tensor, "*batch"] | None = None,
    memory: Memory = "low",
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    class_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence through two linear heads: `jsd_loss` of hidden·weightᵀ + bias.

    $$\beta\,\mathrm{KL}(q\,\|\,m)+(1-\beta)\,\mathrm{KL}(p\,\|\,m),\qquad m=\beta q+(1-\beta)p,\quad
    p=\mathrm{softmax}\big((W_s h_s+b_s)/T\big),\; q=\mathrm{softmax}\big((W_t h_t+b_t)/T\big)$$

    The logits are computed one block at a time and not stored, so the memory does not grow with rows × vocabulary. A
    frozen head needs no memory for its gradient.

    Args:
        student_hidden: `[*batch, student_dim]`, with any leading axes, as in `[batch, tokens, student_dim]`.
        student_weight: the student's head, `[vocabulary, student_dim]`; half precision is multiplied without a conversion.
        teacher_hidden: `[*batch, teacher_dim]`; constant.
        teacher_weight: the teacher's head, `[vocabulary, teacher_dim]`; constant.
        student_bias: `[vocabulary]`, added to the student's logits.
        teacher_bias: `[vocabulary]`, added to the teacher's; constant.
        beta: β from 0 to 1, the teacher's part of the mixture, a Python number. At 0 the loss is KL(q‖p), at 1 KL(p‖q).
        temperature: T > 0; a tensor has a gradient.
        student_scale: a number greater than 0 that the student's logits are multiplied by, such as Cohere's `logit_scale`.
        teacher_scale: the same for the teacher.
        softcap: c, for c·tanh(logits / c) of the scaled logits, as in Gemma 2: one number for both heads, or a pair for student
            and teacher, such as `(None, 30.0)`. A class whose bias is -inf stays excluded.
        weights: `[*batch]`, a factor for the value of each example (or token); constant. The mean is then the sum of
            weight times value over the kept examples, divided by the sum of their weights, as in PyTorch's
            `cross_entropy` with class weights. A weight of 0 leaves the example out.
        memory: `"low"`, or `"least"` for smaller blocks of logits, of a few classes each, in two passes over the
            classes, or three if 0 < β < 1. This takes longer and needs less memory.
        where: `[*batch]`, False for examples (or tokens) that are left out. They contribute nothing to any gradient.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.
        class_group: the process group that the classes are spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`, as `jsd_loss` of the logits, without a factor T². It stores
        the same tensors as `linear_kl_loss`.

    Raises:
        ValueError: a β that is not between 0 and 1.
        ValueError: a temperature, scale or softcap that is not positive, fewer than 2 classes, an unknown reduction or
            `memory`.
        TypeError: a shape or dtype that does not fit, for example vocabularies that differ.

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024,
    https://arxiv.org/abs/2306.13649, with the head inside, as in *Liger Kernel*, Hsu et al., 2024,
    https://arxiv.org/abs/2410.10989.

    >>> import torch
    >>> from kdtorch import jsd_loss, linear_jsd_loss
    >>> h, w = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    >>> g, v = torch.tensor([[0.5]]), torch.tensor([[2.0], [0.0]])
    >>> print(f"{linear_jsd_loss(h, w, g, v):.4f}")
    0.0183
    >>> print(f"{jsd_loss(h @ w.T, g @ v.T):.4f}")
    0.0183
    """
    least = _least(memory)
    _classes(student_hidden, student_weight, class_group, group)
    temperature = positive("temperature", temperature, student_weight, student_hidden, teacher_hidden, teacher_weight)
    outputs = _outputs(softcap, student_scale, teacher_scale, student_hidden)
    student = _student(student_hidden, student_weight, student_bias, temperature)
    fixed = Fixed((teacher_hidden,), teacher_weight, teacher_bias, where, weights, outputs)
    weight = fraction("beta", beta, student_hidden, teacher_hidden)
    if weight == 0:
        value = _kl(student, fixed, summed=reduction != "none", least=least, class_group=class_group)
    elif weight == 1:
        value = _reverse_kl(student, fixed, summed=reduction != "none", least=least, class_group=class_group)
    else:
        value = _jsd(
            student,
            fixed._replace(settings=(weight,)),
            summed=reduction != "none",
            least=least,
            class_group=class_group,
        )
    return _reduced(value, student_hidden, weights, where, reduction, group)


@checked(learns=("student_hidden", "student_weight", "student_bias", "temperature"))
def linear_topk_kl_loss(
    student_hidden: Float[Tensor, "*batch student_dim"],
    student_weight: Float[Tensor, "classes student_dim"],
    values: Float[Tensor, "*batch kept"],
    indices: Integer[Tensor, "*batch kept"],
    rest: Float[Tensor, "*batch"] | Mapping[str, Float[Tensor, "*batch"]] | None = None,
    student_bias: Float[Tensor, "classes"] | None = None,
    *,
    temperature: Scalar = 1.0,
    tail: Literal["bucket", "renormalize"] = "bucket",
    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl",
    beta: float = 0.5,
    kept: Bool[Tensor, "*batch kept"] | None = None,
    student_scale: Scalar = 1.0,
    softcap: float | None = None,
    weights: Float[Tensor, "*batch"] | None = None,
    memory: Memory = "low",
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    class_group: ProcessGroup | None = None,
) -> Tensor:
    r"""`topk_kl_loss` between a student's hidden states through its head and the recorded largest logits of a teacher.

    $$T^2\,\mathrm{KL}(q\,\|\,p),\qquad p=\mathrm{softmax}\big((s_K, \bar s)/T\big),\quad
    q=\mathrm{softmax}\big((t_K, \bar t)/T\big),\qquad s=W h+b,\quad \bar s=T\log\sum_{c\notin K}e^{s_c/T}$$

    The logits are computed one block at a time and not stored, so the memory does not grow with rows × vocabulary. A
    frozen head needs no memory for its gradient.

    Args:
        student_hidden: `[*batch, student_dim]`, with any leading axes, as in `[batch, tokens, student_dim]`.
        student_weight: the student's head, `[vocabulary, student_dim]`; half precision is multiplied without a conversion.
        values: `[*batch, kept]`, the teacher's logits of the kept classes, or their log-probabilities, as in `topk_kl_loss`;
            constant.
        indices: `[*batch, kept]`, the classes; one outside `0 .. classes - 1` is an error. A class that an
            example has twice makes it NaN.
        rest: `[*batch]`, the logit of all other classes together, or a mapping from temperatures to it, as in
            `topk_kl_loss`; constant. It includes the teacher's own scale and softcap, as `values` do.
        student_bias: `[vocabulary]`, added to the student's logits.
        temperature: T > 0; a tensor has a gradient.
        tail: `"bucket"` also compares the mass of all other classes, `"renormalize"` only the kept classes.
        divergence: `"kl"`, `"reverse_kl"` or `"jsd"`, as in `topk_kl_loss`.
        beta: β from 0 to 1 of `divergence="jsd"`, a number; the others do not use it.
        kept: `[*batch, kept]`, False for entries that are padding; their values and indices may be anything.
        student_scale: a number greater than 0 that the student's logits are multiplied by, such as Cohere's `logit_scale`.
        softcap: c, for c·tanh(logits / c) of the student's scaled logits, as in Gemma 2. A class whose bias is -inf stays
            excluded.
        weights: `[*batch]`, a factor for the value of each example (or token); constant. The mean is then the sum of
            weight times value over the kept examples, divided by the sum of their weights, as in PyTorch's
            `cross_entropy` with class weights. A weight of 0 leaves the example out.
        memory: `"low"`, or `"least"` for smaller blocks of logits, of a few classes each, in two passes over the
            classes. This takes longer and needs less memory.
        where: `[*batch]`, False for examples (or tokens) that are left out. They contribute nothing to any gradient.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.
        class_group: the process group that the classes are spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`, as `topk_kl_loss` of the logits. It stores the same
        tensors as `linear_kl_loss`.

    Raises:
        ValueError: a temperature, scale or softcap that is not positive, an unknown tail, divergence, reduction or `memory`,
            a β outside 0 to 1, fewer than 2 classes, more classes kept than there are, no `rest` for the bucket, or one of
            another temperature.
        IndexError: a class outside `0 .. classes - 1`.
        TypeError: a shape or dtype that does not fit.

    Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, https://arxiv.org/abs/1503.02531, on a part
    of the classes, with the student's head inside, as in *Liger Kernel*, Hsu et al., 2024, https://arxiv.org/abs/2410.10989.

    >>> import torch
    >>> from kdtorch import linear_topk_kl_loss, topk_kl_loss
    >>> h = torch.tensor([[1.0, -1.0]])
    >>> w = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> t, kept = torch.tensor([[1.0, 1.0]]), torch.tensor([[1, 0]])
    >>> rest = torch.tensor([-1.0])
    >>> print(f"{linear_topk_kl_loss(h, w, t, kept, rest):.4f}")
    0.4112
    >>> print(f"{topk_kl_loss(h @ w.T, t, kept, rest):.4f}")
    0.4112
    """
    least = _least(memory)
    first, classes = _classes(student_hidden, student_weight, class_group, group)
    temperature = positive("temperature", temperature, student_weight, student_hidden, values)
    outputs = _outputs(softcap, student_scale, 1.0, student_hidden)
    shard = None if class_group is None else (first, student_weight.shape[0])
    teacher = recorded(
        "linear_topk_kl_loss",
        classes,
        values,
        indices,
        rest,
        temperature,
        tail,
        divergence,
        beta,
        kept,
        where,
        shard,
    )
    student = _student(student_hidden, student_weight, student_bias, temperature)
    known = teacher.values, teacher.indices, teacher.rest
    fixed = Fixed(known, None, None, where, weights, outputs, teacher.settings[:-1])
    value = _TOPK[teacher.divergence, tail](
        student, fixed, summed=reduction != "none", least=least, class_group=class_group
    )
    value = value if divergence == "jsd" else times_square(temperature, value)
    return _reduced(value, student_hidden, weights, where, reduction, group)


def _classes(
    hidden: Tensor, weight: Tensor, class_group: ProcessGroup | None, group: ProcessGroup | None
) -> tuple[int | Tensor, int | Tensor]:
    """The first class of this rank, and the number of classes on all ranks, which is at least 2."""
    first, classes = class_range(hidden, weight.shape[0], class_group, group)
    if not isinstance(classes, Tensor) and classes < 2:
        raise ValueError(f"`student_weight` must have at least 2 classes on its first axis, got shape {sizes(weight)}")
    return first, classes


def _least(memory: str) -> bool:
    if memory not in ("low", "least"):
        raise ValueError(f'`memory` must be one of "low", "least", got {memory!r}')
    return memory == "least"


def _outputs(softcap: Any, student_scale: Scalar, teacher_scale: Scalar, like: Tensor) -> tuple[Output, Output]:
    """How the student's head makes its logits, and how the teacher's head does."""
    caps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    for cap in caps if len(caps) == 2 else [math.nan]:
        number = isinstance(cap, numbers.Real) and not isinstance(cap, bool)
        if cap is not None and not (number and 0 < cap < math.inf):
            raise ValueError(
                "`softcap` must be None, a number greater than 0, or a pair of these for student and teacher, "
                f"such as (None, 30.0), got {softcap!r}"
            )
    scales = (
        positive(f"{name}_scale", scale, like, constant=True)
        for name, scale in (("student", student_scale), ("teacher", teacher_scale))
    )
    student, teacher = (None if isinstance(x, float) and x == 1 else scalar(x, like) for x in scales)
    first, second = (None if cap is None else float(cap) for cap in caps)
    return Output(student, first), Output(teacher, second)


def _student(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Scalar) -> Student:
    """The student, with an empty bias if there is none, and the temperature as a tensor."""
    bias = weight.new_empty(0) if bias is None else bias
    return Student(hidden, weight, bias, scalar(temperature, hidden, weight))


def _reduced(
    value: Tensor,
    hidden: Tensor,
    weights: Tensor | None,
    where: Tensor | None,
    reduction: Reduction,
    group: ProcessGroup | None,
) -> Tensor:
    if reduction == "none":
        return reduce(value, where, reduction, group)
    check_reduction(reduction)
    if weights is not None and reduction == "mean":
        return weighted_mean(value, weights, where, group)
    return reduce_sum(value, math.prod(hidden.shape[:-1]), where, reduction, group)


def _kl_of_student(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp().sub_(log_q.exp())


def _kl_of_teacher(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q log(q / p). If p is 0, it counts as if the student gave the class the smallest positive number."""
    most = -math.log(torch.finfo(log_q.dtype).tiny)
    return (log_q - log_p).nan_to_num_(nan=0.0, posinf=most, neginf=0.0).mul_(log_q.exp())


def _jsd_of_student(log_p: Tensor, log_q: Tensor, beta: Scalar) -> Tensor:
    """(1 - b) p log(p / m), m = b q + (1 - b) p."""
    ratio = (log_q - log_p).nan_to_num_(nan=0.0).clamp_(-80, 80)  # infinite for a class at -inf in one of the two
    return ratio.expm1_().mul_(beta).log1p_().mul_(log_p.exp()).mul_(beta - 1)


def _jsd_of_teacher(log_p: Tensor, log_q: Tensor, beta: Scalar) -> Tensor:
    return _jsd_of_student(log_q, log_p, 1 - beta)


def _pull(of_teacher: Any, x: Tensor, y: Tensor, *settings: Scalar, class_group: ProcessGroup | None) -> Tensor:
    return dot(of_teacher(x, y, *settings, class_group=class_group), y)


def _renormalized_and_gradient(
    divergence_and_gradient: Any,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor,
    *settings: Scalar,
    class_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """A divergence over the classes of `indices`, where an index below 0 stands for no class; the gradient over all."""
    value, gradient = divergence_and_gradient(_kept(x, indices), values, *settings, class_group=class_group)
    entries = torch.where(indices < 0, 0, gradient)
    return value, torch.zeros_like(x).scatter_add_(-1, indices.clamp(min=0), entries)


def _kept(x: Tensor, indices: Tensor) -> Tensor:
    return torch.where(indices < 0, -math.inf, x.gather(-1, indices.clamp(min=0)))


def _pull_of_kept(
    of_teacher: Any,
    bucket: bool,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor,
    *settings: Scalar,
    class_group: ProcessGroup | None,
) -> Tensor:
    student, teacher = _kept(x, indices), values
    if bucket:
        student = kept_and_rest(x, indices, settings[-1], class_group)[0]
        teacher = torch.cat([values, on_first(rest, class_group, -math.inf)], -1)
    return _pull(of_teacher, student, teacher, *settings, class_group=class_group)


_AND_GRADIENT: dict[str, Callable[..., Any]] = {
    "kl": kl_and_gradient,
    "reverse_kl": reverse_kl_and_gradient,
    "jsd": jsd_and_gradient,
}
_OF_TEACHER: dict[str, Callable[..., Any]] = {
    "kl": lambda x, y, t, **over: reverse_kl_and_gradient(y, x, t, **over)[1],
    "reverse_kl": lambda x, y, t, **over: kl_and_gradient(y, x, t, **over)[1],
    "jsd": lambda x, y, beta, t, **over: jsd_and_gradient(y, x, 1 - beta, t, **over)[1],
}


def _of_heads(name: str, by_classes: Any) -> Any:
    pull = functools.partial(_pull, _OF_TEACHER[name])
    return linear(f"linear_{name}_loss", Divergence(_AND_GRADIENT[name], pull, by_classes))


def _of_kept(name: str, tail: str) -> Any:
    rows = topk_and_gradient if tail == "bucket" else _renormalized_and_gradient
    divergence, of_teacher, bucket = _AND_GRADIENT[name], _OF_TEACHER[name], tail == "bucket"
    pull = functools.partial(_pull_of_kept, of_teacher, bucket)
    by_classes = of_kept(divergence, of_teacher, bucket)
    return linear(f"linear_topk_{name}_{tail}", Divergence(functools.partial(rows, divergence), pull, by_classes))


def _swapped(of: Any) -> Any:
    return lambda log_p, log_q: of(log_q, log_p)


_kl = _of_heads("kl", of_heads(_kl_of_student, _kl_of_teacher, lambda p, q: (None, -q)))
_reverse_kl = _of_heads(
    "reverse_kl", of_heads(_swapped(_kl_of_teacher), _swapped(_kl_of_student), lambda p, q: (p, None))
)
_jsd = _of_heads("jsd", of_heads(_jsd_of_student, _jsd_of_teacher))
_TOPK = {(name, tail): _of_kept(name, tail) for name in _AND_GRADIENT for tail in ("bucket", "renormalize")}
