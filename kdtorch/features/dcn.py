"""Dynamic centre norm: the student's feature along its class's centre."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdtorch._numerics import may_learn, no_autocast, own, promote, unit, unit_pull, valid_index
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
        teacher: the same shape; constant. Only its norm is used.
        labels: `[*batch]`, the class of each example; one outside `0 .. classes - 1` is an error.
        centers: `[classes, dim]`, learned with the student (`kdtorch.nn.DynamicCenterNormLoss` holds them).
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. Where the two norms are equal, the gradient is that of the
        student's norm. Two zero features give 1 with gradient 0, and so does a zero centre.

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
    (labels,) = zero_masked(where, labels)
    labels, mask = own(valid_index("labels", labels, len(centers))), None if where is None else own(where)
    run = _AlongCenter.apply if may_learn(student) or may_learn(centers) else _AlongCenter.forward
    with no_autocast(student):
        value, *_ = run(student, centers, teacher.detach(), labels, mask)
    return reduce(value, where, reduction, group)


# The gradient is written by hand, so that until the backward pass only the two trained inputs are stored, in their
# dtypes, and one number per example of the teacher. It consists of differentiable operations, so it can be
# differentiated again.
class _AlongCenter(torch.autograd.Function):
    """1 - s.c / max(|s|, |t|), where c is the unit centre of the example's class.

    It depends only on s / scale and t / scale, whose squares neither overflow nor underflow.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor, centers: Tensor, teacher: Tensor, labels: Tensor, where: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, t, rows = promote(student, teacher, centers[labels])
        s, t = zero_masked(where, s, t)
        scale = torch.maximum(s.abs(), t.abs()).amax(-1, keepdim=True)
        scale = torch.where(scale < torch.finfo(s.dtype).tiny, math.inf, scale)  # two zero features stay 0
        teacher_square = (t / scale).square().sum(-1, keepdim=True)
        return 1 - _cosine(s / scale, unit(rows), teacher_square)[0].squeeze(-1), scale, teacher_square

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        student, centers, _, labels, where = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(student, centers, labels, where, *output[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        student, centers, labels, where, scale, teacher_square = ctx.saved_tensors
        with no_autocast(cotangent):
            s, rows = (x.to(scale.dtype) for x in (student, centers[labels]))
            x, above, center = zero_masked(where, s)[0] / scale, cotangent.unsqueeze(-1), unit(rows)
            cosine, length, shorter = _cosine(x, center, teacher_square)
            of_student = above * (torch.where(shorter, 0, cosine / length) * x - center) / length / scale
            of_rows = unit_pull(rows, -above * x / length)
            of_centers = of_rows.new_zeros(centers.shape).index_put_((labels,), of_rows, accumulate=True)
        return of_student.to(student.dtype), of_centers.to(centers.dtype), None, None, None


def _cosine(student: Tensor, center: Tensor, teacher_square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s.c / max(|s|, |t|), this maximum, and whether it is the teacher's."""
    square = student.square().sum(-1, keepdim=True)
    shorter = square < teacher_square
    square = torch.where(shorter, teacher_square, square)
    length = torch.where(square == 0, 1, square).sqrt()
    return (student * center).sum(-1, keepdim=True) / length, length, shorter
