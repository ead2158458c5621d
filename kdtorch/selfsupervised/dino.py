"""DINO: self-distillation with no labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdtorch._collectives import all_sum, size
from kdtorch._numerics import check_state, cross_entropy_and_gradient, fraction, positive, softmax, widest
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked


class DINOState(NamedTuple):
    """The running centre of the teacher's outputs.

    Attributes:
        center: `[dim]`, subtracted from the teacher's outputs.

    >>> from kdtorch import dino_init
    >>> dino_init(3).center.tolist()
    [0.0, 0.0, 0.0]
    """

    center: Float[Tensor, "dim"]


def dino_init(dim: int, dtype: torch.dtype = torch.float32) -> DINOState:
    """A centre of zeros.

    Args:
        dim: the width of the outputs.
        dtype: of the centre, float32 or wider.

    Returns:
        The state that `dino_loss` starts from.

    Raises:
        ValueError: a `dim` below 1, a dtype narrower than float32.

    >>> from kdtorch import dino_init
    >>> tuple(dino_init(3).center.shape)
    (3,)
    """
    if dim < 1:
        raise ValueError(f"`dim` must be at least 1, got {dim}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be float32 or float64, got {str(dtype).removeprefix('torch.')}")
    return DINOState(torch.zeros(dim, dtype=dtype))


def dino_teacher_temperature(
    epoch: int | Tensor, *, warmup: float = 0.04, final: float = 0.04, warmup_epochs: int = 0
) -> Tensor:
    """The teacher's temperature: linear from `warmup` at epoch 0 to `final` at `warmup_epochs - 1`, then `final`.

    Args:
        epoch: any epoch ≥ 0, an integer or a tensor. `torch.compile` compiles once more for the second integer.
        warmup: the first temperature.
        final: the last one.
        warmup_epochs: the number of epochs in the warm-up, as in the released `linspace(warmup, final, warmup_epochs)`:
            with 0 the temperature is `final` throughout, with 1 it is `warmup` at epoch 0 and `final` from epoch 1 on.

    Returns:
        The temperature, of the shape of `epoch`.

    Raises:
        ValueError: a temperature that is not positive, negative `warmup_epochs`.

    >>> from kdtorch import dino_teacher_temperature
    >>> warmup = {"warmup": 0.04, "final": 0.07, "warmup_epochs": 4}
    >>> [round(float(dino_teacher_temperature(e, **warmup)), 3) for e in range(5)]
    [0.04, 0.05, 0.06, 0.07, 0.07]
    """
    # with `as_tensor` of an integer, `torch.compile` would compile again for each value
    epoch = torch.as_tensor(torch.full((), epoch) if isinstance(epoch, int) else epoch, dtype=torch.float64)
    for name, value in (("warmup", warmup), ("final", final)):
        positive(name, value, epoch)
    if warmup_epochs < 0:
        raise ValueError(f"`warmup_epochs` must be at least 0, got {warmup_epochs}")
    if warmup_epochs == 0:
        return torch.full_like(epoch, final)
    return warmup + (final - warmup) * (epoch / max(warmup_epochs - 1, 1)).clamp(0, 1)


def check_views(views: int, teacher_views: int, given: str) -> None:
    if not 1 <= teacher_views <= views or views < 2:
        raise ValueError(
            "the views must fit: at least 1 teacher view, at least 2 student views, the first of them the teacher's, "
            f"got {given}"
        )


@checked(learns=("student", "student_temperature"))
def dino_loss(
    student: Float[Tensor, "student_views batch dim"],
    teacher: Float[Tensor, "teacher_views batch dim"],
    state: DINOState,
    *,
    teacher_temperature: Scalar = 0.04,
    student_temperature: Scalar = 0.1,
    center_momentum: Scalar = 0.9,
    teacher_targets: Float[Tensor, "teacher_views batch dim"] | None = None,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    update: bool = True,
) -> tuple[Tensor, DINOState]:
    r"""DINO: the student predicts, from one view, the teacher's centred and sharpened output for another view.

    $$-\frac1N\sum_{u\ne v}\sum_k q_{uk}\log p_{vk},\qquad q_u=\mathrm{softmax}\big((t_u-c)/\tau_t\big),\quad
    p_v=\mathrm{softmax}(s_v/\tau_s)$$

    over the N = U·V − U pairs of different views. The centre c is used first, and then becomes m·c + (1 − m)·mean(t),
    the mean over views and kept examples. This is a cross-entropy, so it is not 0 if student and teacher are equal.

    Args:
        student: `[student_views, batch, dim]`; the first `teacher_views` of them are the teacher's views.
        teacher: `[teacher_views, batch, dim]`; constant.
        state: the centre, from `dino_init(dim)` or the previous step.
        teacher_temperature: τ_t > 0, a constant; `dino_teacher_temperature` returns its warm-up.
        student_temperature: τ_s > 0; a tensor has a gradient.
        center_momentum: m in [0, 1], a constant.
        teacher_targets: `[teacher_views, batch, dim]`, probabilities to use instead of the teacher's q, for example
            from `sinkhorn_knopp`; constant. `teacher` is then not used, and the centre does not change.
        where: `[batch]`, False for examples that are left out, also from the centre.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.
        update: False leaves the state unchanged, for every micro-batch of a step except the last.

    Returns:
        The loss and the next state, in the state's dtype. A batch that would make the centre non-finite, or one with no
        kept example, leaves it unchanged.

    Raises:
        ValueError: views that do not fit, a temperature that is not positive, a momentum outside [0, 1], a state
            in half precision, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Caron et al., *Emerging Properties in Self-Supervised Vision Transformers*, ICCV 2021,
    https://arxiv.org/abs/2104.14294. The sum over pairs is computed as Σ_v (Σ_{u≠v} q_u)·log p_v, with one log-softmax
    for each view; the released code computes one for each pair.

    >>> import torch
    >>> from kdtorch import dino_init, dino_loss
    >>> views = torch.tensor([[[2.0, 0.0, -1.0]], [[1.0, 1.0, -1.0]]])
    >>> loss, state = dino_loss(views, views, dino_init(3))
    >>> print(f"{loss:.4f}", [round(float(x), 2) for x in state.center])
    5.3466 [0.15, 0.05, -0.1]
    """
    views, teacher_views = student.shape[0], teacher.shape[0]
    check_views(views, teacher_views, f"student {list(student.shape)} and teacher {list(teacher.shape)}")
    check_state(state)
    old = state.center.detach().clone().to(teacher.device)  # a module changes its own in place
    teacher_temperature = positive("teacher_temperature", teacher_temperature, student, teacher, constant=True)
    student_temperature = positive("student_temperature", student_temperature, student, teacher)
    momentum = fraction("center_momentum", center_momentum, old)

    views_of = student.transpose(0, 1)
    if teacher_targets is not None:
        pairs = _pairs_of_targets(views_of, teacher_targets.transpose(0, 1), student_temperature, where=where)
        return reduce(pairs, where, reduction, group), state
    center = old.to(widest(student, teacher)).expand(teacher.shape[1], 1, -1)  # for each example
    pairs = _pairs(views_of, teacher.transpose(0, 1), center, teacher_temperature, student_temperature, where=where)
    loss = reduce(pairs, where, reduction, group)
    if not update:
        return loss, state

    teacher = teacher.detach()
    if where is not None:
        teacher = torch.where(where[None, :, None], teacher, 0)
    total = teacher.sum((0, 1), dtype=center.dtype)
    batch = size(group) * teacher.shape[1]
    kept = total.new_tensor(batch) if where is None else all_sum(where.sum(dtype=total.dtype), group)
    return loss, DINOState(moved_center(old, all_sum(total, group), kept * teacher_views, momentum))


def moved_center(center: Tensor, total: Tensor, number: Tensor, momentum: Scalar) -> Tensor:
    """m times the centre plus 1 - m times the mean; the old centre if there is no mean, or if it is not finite."""
    mean = (total / number.clamp(min=1)).to(center.dtype)
    padding = torch.isneginf(mean)
    moved = torch.where(padding, center, momentum * center + (1 - momentum) * mean)
    return torch.where(torch.isfinite(moved).all() & (number > 0), moved, center)


def pairs_and_gradient(
    x: Tensor, y: Tensor, center: Tensor, teacher_temperature: Scalar, temperature: Scalar
) -> tuple[Tensor, Tensor]:
    """Value and gradient for the student's views, on the axis before the last, and the teacher's, which are centred."""
    return pairs_of_targets_and_gradient(x, softmax(y - center, teacher_temperature).p, temperature)


def pairs_of_targets_and_gradient(x: Tensor, q: Tensor, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """Value and gradient for the student's views and the teacher's probabilities.

    The gradient is written by hand and shares softmaxes with the value, for the speed and memory in
    docs/performance.md.
    """
    views, teacher_views = x.shape[-2], q.shape[-2]
    every = q.sum(-2, keepdim=True)
    parts = [(x[..., :teacher_views, :], (every - q).clamp(min=0))]  # the sum of the teacher's other views
    if views > teacher_views:
        parts.append((x[..., teacher_views:, :], every))
    values, gradients = zip(*(cross_entropy_and_gradient(*part, temperature) for part in parts), strict=True)
    number = views * teacher_views - teacher_views
    return torch.cat(values, -1).sum(-1) / number, torch.cat(gradients, -2).div_(number)


_pairs = rowwise(pairs_and_gradient, axes=2)
_pairs_of_targets = rowwise(pairs_of_targets_and_gradient, axes=2)
