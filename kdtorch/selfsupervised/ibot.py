"""iBOT: self-distillation of masked patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdtorch._collectives import all_sum
from kdtorch._numerics import check_state, cross_entropy_and_gradient, fraction, positive, softmax, widest
from kdtorch._reduce import reduce, zero_masked
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked
from kdtorch.selfsupervised.dino import dino_init, moved_center


class IBOTState(NamedTuple):
    """The running centre of the teacher's patches.

    Attributes:
        center: `[dim]`, subtracted from the teacher's outputs.

    >>> from kdtorch import ibot_init
    >>> ibot_init(3).center.tolist()
    [0.0, 0.0, 0.0]
    """

    center: Float[Tensor, "dim"]


def ibot_init(dim: int, dtype: torch.dtype = torch.float32) -> IBOTState:
    """A centre of zeros.

    Args:
        dim: the width of the outputs.
        dtype: of the centre, float32 or wider.

    Returns:
        The state that `ibot_loss` starts from.

    Raises:
        ValueError: a `dim` below 1, a dtype narrower than float32.

    >>> from kdtorch import ibot_init
    >>> tuple(ibot_init(3).center.shape)
    (3,)
    """
    return IBOTState(dino_init(dim, dtype).center)


@checked(learns=("student", "student_temperature"))
def ibot_loss(
    student: Float[Tensor, "batch patches dim"],
    teacher: Float[Tensor, "batch patches dim"],
    mask: Bool[Tensor, "batch patches"],
    state: IBOTState,
    *,
    teacher_temperature: Scalar = 0.04,
    student_temperature: Scalar = 0.1,
    center_momentum: Scalar = 0.9,
    teacher_targets: Float[Tensor, "batch patches dim"] | None = None,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    update: bool = True,
) -> tuple[Tensor, IBOTState]:
    r"""iBOT: the student, which sees an image with masked patches, predicts the teacher's output for each of them.

    $$-\frac1{|M|}\sum_{i\in M}\sum_k q_{ik}\log p_{ik},\qquad q_i=\mathrm{softmax}\big((t_i-c)/\tau_t\big),\quad
    p_i=\mathrm{softmax}(s_i/\tau_s)$$

    over the masked patches M of an image. Without masked patches the value is 0, and the image counts in the mean. The
    centre c is used first, and then becomes m·c + (1 - m)·mean(t), the mean over the masked patches of all kept images.
    This is a cross-entropy, so it is not 0 if student and teacher are equal.

    Args:
        student: `[batch, patches, dim]`, of the masked image. Patches that are not masked are not read.
        teacher: `[batch, patches, dim]`, of the whole image; constant. Patches that are not masked are not read.
        mask: `[batch, patches]`, True for the patches that were masked in the student's image.
        state: the centre, from `ibot_init(dim)` or the previous step.
        teacher_temperature: τ_t > 0, a constant; `dino_teacher_temperature` returns its warm-up.
        student_temperature: τ_s > 0; a tensor has a gradient.
        center_momentum: m in [0, 1], a constant.
        teacher_targets: `[batch, patches, dim]`, probabilities to use instead of q, for example from `sinkhorn_knopp`;
            constant. `teacher` is then not used, and the centre does not change.
        where: `[batch]`, False for images that are left out, also from the centre.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.
        update: False leaves the state unchanged, for every micro-batch of a step except the last.

    Returns:
        The loss and the next state, in the state's dtype. A batch that would make the centre non-finite, or one with no
        masked patch in a kept image, leaves it unchanged.

    Raises:
        ValueError: a temperature that is not positive, a momentum outside [0, 1], a state in half precision, an unknown
            reduction.
        TypeError: a shape or dtype that does not fit.

    Zhou et al., *iBOT: Image BERT Pre-Training with Online Tokenizer*, ICLR 2022, https://arxiv.org/abs/2111.07832. The
    centre is the mean of the masked patches, as in DINOv2's training loop and in Lightly; iBOT's own code uses all
    patches. In the released codes a batch without a masked patch makes the centre NaN from then on.

    >>> import torch
    >>> from kdtorch import ibot_init, ibot_loss
    >>> patches = torch.tensor([[[2.0, 0.0, -1.0], [1.0, 1.0, -1.0]]])
    >>> mask = torch.tensor([[False, True]])
    >>> loss, state = ibot_loss(patches, patches, mask, ibot_init(3))
    >>> print(f"{loss:.4f}", [round(float(x), 2) for x in state.center])
    0.6931 [0.1, 0.1, -0.1]
    """
    check_state(state)
    old = state.center.detach().clone().to(teacher.device)  # a module changes its own in place
    teacher_temperature = positive("teacher_temperature", teacher_temperature, student, teacher, constant=True)
    student_temperature = positive("student_temperature", student_temperature, student, teacher)
    momentum = fraction("center_momentum", center_momentum, old)

    mask = mask if where is None else mask & where[:, None]
    if teacher_targets is not None:
        values = _patches_of_targets(student, teacher_targets, student_temperature, where=mask)
    else:
        center = old.to(widest(student, teacher)).expand(teacher.shape)
        values = _patches(student, teacher, center, teacher_temperature, student_temperature, where=mask)
    (values,) = zero_masked(mask, values)
    loss = reduce(values.sum(1) / mask.sum(1, dtype=values.dtype).clamp(min=1), where, reduction, group)
    if teacher_targets is not None or not update:
        return loss, state

    dtype = widest(student, teacher)
    total = torch.where(mask[:, :, None], teacher.detach(), 0).sum((0, 1), dtype=dtype)
    total, number = all_sum(total, group), all_sum(mask.sum(dtype=dtype), group)
    return loss, IBOTState(moved_center(old, total, number, momentum))


def patch_and_gradient(
    x: Tensor, y: Tensor, center: Tensor, teacher_temperature: Scalar, temperature: Scalar
) -> tuple[Tensor, Tensor]:
    """Value and gradient for patches and the centred teacher's patches."""
    return cross_entropy_and_gradient(x, softmax(y - center, teacher_temperature).p, temperature)


_patches = rowwise(patch_and_gradient)
_patches_of_targets = rowwise(cross_entropy_and_gradient)
