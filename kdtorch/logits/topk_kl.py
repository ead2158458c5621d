"""Knowledge distillation from the teacher's largest logits alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kdtorch._numerics import check_classes, kl_divergence, positive, promote, softmax, valid_index
from kdtorch._reduce import reduce, zero_masked
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked


@checked(dtensor="any")
def topk_kl_loss(
    student_logits: Float[Tensor, "*batch classes"],
    values: Float[Tensor, "*batch kept"],
    indices: Integer[Tensor, "*batch kept"],
    rest: Float[Tensor, "*batch"] | None = None,
    *,
    temperature: Scalar = 1.0,
    tail: Literal["bucket", "renormalize"] = "bucket",
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""KL divergence to a teacher of whom k logits an example are kept, with all other classes as one, or left out.

    $$T^2\,\mathrm{KL}(q\,\|\,p),\qquad p=\mathrm{softmax}\big((s_K, \bar s)/T\big),\quad
    q=\mathrm{softmax}\big((t_K, \bar t)/T\big),\qquad \bar x=T\log\sum_{c\notin K}e^{x_c/T}$$

    over the k kept classes K and, with `tail="bucket"`, one more for the rest; without it with `"renormalize"`.

    Args:
        student_logits: `[*batch, classes]`.
        values: `[*batch, kept]`, the teacher's logits of the kept classes, or their logarithms of probabilities at
            temperature 1, with `rest` shifted by the same number; constant, their gradient is 0.
        indices: `[*batch, kept]`, the classes, each once in an example; one outside `0 .. classes - 1` is an error, and a
            class that is there twice gives NaN for that example.
        rest: `[*batch]`, t̄, the logit of all other classes together, for the temperature of the call: k logits and one
            mass at T = 1 do not say what the others weigh at another. `record_teacher` keeps it for each of its
            `temperatures`. Needed for the bucket, unless all classes are kept; -inf where nothing is left.
        temperature: T > 0.
        tail: `"bucket"` compares the rest's whole mass too: a lower bound of the full KL, and equal to it when k is the
            number of classes or the rest is distributed in the student as in the teacher. `"renormalize"` compares the
            kept classes among themselves, at any temperature: the student is free in what it gives to the rest.
        where: `[*batch]`, False for examples that count for nothing.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"`.
        group: the process group that the batch is spread over; the mean over ranks of what they return, and of their
            gradients, is then that of the whole batch.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. 0 where the two distributions agree, never below; inf where the
        student gives -inf to a class that the teacher uses.

    Raises:
        ValueError: a temperature that is not positive, an unknown tail or reduction, fewer than 2 classes, more classes
            kept than there are, no `rest` for the bucket.
        IndexError: a class outside `0 .. classes - 1`.
        TypeError: a shape or dtype that does not fit.

    Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, https://arxiv.org/abs/1503.02531, on a
    part of the classes. The mass of the rest is a log-sum-exp over the student's other logits, not one less the sum of
    the kept ones, which has no digits left where they are nearly all.

    >>> import torch
    >>> from kdtorch import topk_kl_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    >>> kept, rest = torch.tensor([[1, 0]]), torch.tensor([-1.0])
    >>> print(f"{topk_kl_loss(s, t, kept, rest):.4f}")
    0.4112
    """
    student, values, *rests = promote(student_logits, values, *() if rest is None else (rest,))
    student, values, indices, *rests = zero_masked(where, student, values, indices, *rests)
    check_classes(student)
    temperature = positive("temperature", temperature, student)
    kept, classes = indices.shape[-1], student.shape[-1]
    if tail not in ("bucket", "renormalize"):
        raise ValueError(f'`tail` must be one of "bucket", "renormalize", got {tail!r}')
    if not 1 <= kept <= classes:
        raise ValueError(
            f"`indices` must hold from 1 to {classes} classes an example, as many as there are, got {kept}"
        )
    if tail == "bucket" and rest is None and kept < classes:
        raise ValueError(
            f'`rest` must be given with tail="bucket" where {kept} of {classes} classes are kept, got None; '
            'leave the rest out by tail="renormalize"'
        )
    indices = valid_index("indices", indices, classes)
    twice = (indices.sort(-1).values.diff(dim=-1) == 0).any(-1)
    factor = torch.where(twice, math.nan, 1.0).to(student.dtype)
    x, y = student.gather(-1, indices), values.detach()
    if tail == "bucket":
        left = torch.full_like(y[..., 0], -math.inf) if rest is None else rests[0].detach()
        x, y = _with_rest(student, x, indices, temperature), torch.cat([y, left[..., None]], -1)
    else:
        x = _scaled(x, temperature)
    return reduce(factor * temperature**2 * kl_divergence(x, _scaled(y, temperature), 1.0), where, reduction, group)


def _with_rest(student: Tensor, kept: Tensor, indices: Tensor, temperature: Scalar) -> Tensor:
    """Logits, at temperature 1, of the kept classes and of the others together."""
    lowest = torch.finfo(student.dtype).min
    others = student.scatter(-1, indices, -math.inf)
    _, peak, log_total = softmax(others, temperature)
    largest = student.detach().amax(-1, keepdim=True).clamp(min=lowest)
    rest = (peak - largest) / temperature + log_total
    rest = torch.where(torch.isneginf(others.detach().amax(-1, keepdim=True)), -math.inf, rest)
    return torch.cat([(kept - largest) / temperature, rest], -1)


def _scaled(x: Tensor, temperature: Scalar) -> Tensor:
    """Logits, at temperature 1, with the softmax of x / temperature."""
    return (x - x.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)) / temperature
