"""Dynamic centre norm: the student's feature along its class's centre."""

from __future__ import annotations

import torch
from torch import Tensor

from kdtorch._numerics import promote, unit, valid_index
from kdtorch._reduce import reduce, zero_masked
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, checked


@checked(learns=("student", "centers"), dtensor="any")
def dcn_loss(
    student: Float[Tensor, "*batch dim"],
    teacher: Float[Tensor, "*batch dim"],
    labels: Integer[Tensor, "*batch"],
    centers: Float[Tensor, "classes dim"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Dynamic centre norm: the student's feature should lie along its class's learned centre, no shorter than the teacher's.

    $$1-\frac{s\cdot\hat c_y}{\max(\|s\|,\|t\|)},\qquad\hat c_y=c_y/\|c_y\|$$

    Args:
        student: `[*batch, dim]`.
        teacher: the same shape; constant, its gradient is 0. Only its norm is used.
        labels: `[*batch]`, the class of each example; one outside `0 .. classes - 1` is an error.
        centers: `[classes, dim]`, learned with the student (`kdtorch.nn.DynamicCenterNormLoss` holds them).
        where: `[*batch]`, False for examples that count for nothing.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"`.
        group: the process group that the batch is spread over; the mean over ranks of what they return, and of their
            gradients, is then that of the whole batch.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. Where the two norms are equal the gradient is the student's;
        two zero features give 1, with gradient 0, and so does a zero centre.

    Raises:
        ValueError: an unknown reduction.
        IndexError: a label outside `0 .. classes - 1`.
        TypeError: a shape or dtype that does not fit.

    The founding repository's DynamicCenterNormLoss, after Wang et al., *Improving Knowledge Distillation via
    Regularizing Feature Norm and Direction*, 2023, https://arxiv.org/abs/2305.17007, where the centres are the
    teacher's class means. The released code loops over the batch and is NaN at a zero feature or centre.

    >>> import torch
    >>> from kdtorch import dcn_loss
    >>> s, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> centers = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    >>> print(f"{dcn_loss(s, t, torch.tensor([1]), centers):.4f}")
    0.5000
    """
    student, teacher, centers = promote(student, teacher, centers)
    student, teacher, labels = zero_masked(where, student, teacher, labels)
    labels = valid_index("labels", labels, len(centers))
    center = unit(centers[labels])

    # the value depends on s/scale and t/scale alone, which neither overflow nor vanish when squared
    scale = torch.maximum(student.detach().abs(), teacher.detach().abs()).amax(-1, keepdim=True)
    zero = scale < torch.finfo(student.dtype).tiny
    student, teacher = (torch.where(zero, 0, x / torch.where(zero, 1, scale)) for x in (student, teacher))
    student_square, teacher_square = student.square().sum(-1), teacher.detach().square().sum(-1)
    square = torch.where(student_square < teacher_square, teacher_square, student_square)
    cosine = (student * center).sum(-1) / torch.where(square == 0, 1, square).sqrt()
    return reduce(1 - cosine, where, reduction, group)
