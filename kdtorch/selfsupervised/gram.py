"""Gram anchoring: keeps the cosines between an image's patches close to those of a teacher."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kdtorch._collectives import all_gather, all_gather_constant, check_batch, local_rows
from kdtorch._numerics import BLOCK, coupled, custom_op, promote, unit, unit_pull
from kdtorch._reduce import check_reduction, count, reduce, reduce_sum, zero_masked
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, checked

Clip = Literal["none", "both", "teacher"]


@checked
def gram_loss(
    student: Float[Tensor, "batch patches student_dim"],
    teacher: Float[Tensor, "batch patches teacher_dim"],
    *,
    normalize: bool = True,
    image_level: bool = True,
    clip_negative: Clip = "none",
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Gram anchoring: mean squared error between the products of all pairs of patches of student and teacher.

    $$\frac1{P^2}\sum_{ij}\big(\hat s_i\cdot\hat s_j-\hat t_i\cdot\hat t_j\big)^2$$

    for an image with P patches, which are normalised to unit length unless `normalize=False`. With `image_level=False`
    j runs over the patches of all images of the batch.

    Args:
        student: `[batch, patches, student_dim]`.
        teacher: `[batch, patches, teacher_dim]`, of any width; constant. In DINOv3 the teacher is an early average of
            the student.
        normalize: whether patches are divided by their lengths.
        image_level: whether a patch is compared only with the patches of its own image.
        clip_negative: whose negative products become 0: `"none"`, `"both"`, or `"teacher"`. A clipped product has no
            gradient.
        where: `[batch]`, False for images that are left out, also as partners of other images.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. The products of a zero patch are 0, and it has no gradient if
        patches are normalised.

    Raises:
        ValueError: an unknown `clip_negative` or reduction.
        TypeError: a shape or dtype that does not fit.

    Siméoni et al., *DINOv3*, 2025, https://arxiv.org/abs/2508.10104. The released recipes keep negative products; the
    default of the released class is to clip those of both sides. Its option `remove_only_teacher_neg` is also meant to
    clip the student where both are negative, but never does, because the teacher's products are already 0.

    >>> import torch
    >>> from kdtorch import gram_loss
    >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> print(f"{gram_loss(student, teacher):.4f}")
    0.5000
    """
    check_clip(clip_negative)
    check_reduction(reduction)
    check_batch(student, group)
    local, kept = local_rows(len(student), group), where
    if image_level:
        local = slice(0, len(student))
    elif group is not None:  # so that gradients are not summed in half precision
        student, teacher = promote(student, teacher)
        student, teacher = all_gather(student, group), all_gather_constant(teacher, group)
        kept = None if where is None else all_gather_constant(where, group)
    options = normalize, image_level, clip_negative
    value = _squares(student, teacher, kept, local.start, local.stop, *options, summed=reduction != "none")
    if reduction == "none":
        return reduce(value, where, reduction, group)
    return reduce_sum(value, local.stop - local.start, where, reduction, group)


def check_clip(clip_negative: str) -> None:
    if clip_negative not in get_args(Clip):
        raise ValueError(f'`clip_negative` must be one of "none", "both", "teacher", got {clip_negative!r}')


# Written by hand with its gradient, so that no array is larger than a block of products, and each product is computed
# once.
@custom_op(
    "(Tensor student, Tensor teacher, Tensor? kept, SymInt start, SymInt stop, bool normalize, bool image_level,"
    " str clip_negative, Tensor? weights, bool asked) -> (Tensor, Tensor)",
    lambda student, teacher, kept, start, stop, normalize, image_level, clip_negative, weights, asked: (
        (x := promote(student, teacher)[0]).new_empty(stop - start),
        x.new_empty(x.shape if asked else 0),
    ),
)
def _evaluate(
    student: Tensor,
    teacher: Tensor,
    kept: Tensor | None,
    start: int,
    stop: int,
    normalize: bool,
    image_level: bool,
    clip_negative: Clip,
    weights: Tensor | None,
    asked: bool,
) -> tuple[Tensor, Tensor]:
    """The value of this rank's images, and the gradient of the weighted sum of these values."""
    student, teacher = zero_masked(kept, *promote(student, teacher))
    x, y = (unit(student), unit(teacher)) if normalize and not image_level else (student, teacher)
    value, gradient = x.new_zeros(stop - start), x.new_zeros(x.shape if asked else 0)
    patches, whole = x.shape[1], weights is None and stop - start == len(x)
    pairs = patches * (patches if image_level else patches * len(x))
    number = patches**2 if image_level else patches**2 * (len(x) if kept is None else count(kept, x.dtype))
    number = max(number, 1) if isinstance(number, int) else number
    block = max((BLOCK if x.is_cpu else 2**24) // max(pairs, 1), 1)
    for first in range(start, stop, block):
        part = slice(first, min(first + block, stop))
        here = slice(part.start - start, part.stop - start)
        a, c = x[part], y[part]
        if image_level and normalize:  # inside the loop, where a CPU's caches hold them
            a, c = unit(a), unit(c)
        b, d = a, c
        if not image_level:
            a, b, c, d = (z.reshape(1, -1, z.shape[2]) for z in (a, x, c, y))
        gap, felt = _gap(a, b, c @ d.mT, normalize, clip_negative)
        value[here] = torch.linalg.vector_norm(gap.view(part.stop - part.start, -1), dim=1).square_()
        if asked:
            if weights is not None:
                felt.view(part.stop - part.start, -1).mul_(weights[here, None])
            pull = (felt @ b).mul_((4 if image_level or whole else 2) / number).view_as(x[part])
            gradient[part] += unit_pull(student[part], pull) if normalize and image_level else pull
            if not (image_level or whole):
                gradient += (felt.mT @ a).mul_(2 / number).view_as(x)
    if asked:
        gradient = unit_pull(student, gradient) if normalize and not image_level else gradient
        (gradient,) = zero_masked(kept, gradient)
    return value.div_(number), gradient


_squares = coupled(_evaluate, learns=1)


def _gap(a: Tensor, b: Tensor, theirs: Tensor, normalize: bool, clip_negative: Clip) -> tuple[Tensor, Tensor]:
    """The student's products minus the teacher's, and the same with 0 where the clipping has no gradient.

    For rows of unit length, a product that is 0 except for rounding is clipped too.
    """
    if clip_negative != "none":
        theirs = theirs.clamp_(min=0)
    if clip_negative != "both":
        gap = torch.baddbmm(theirs, a, b.mT, beta=-1)
        return gap, gap
    ours = a @ b.mT
    clipped = ours <= (8 * torch.finfo(ours.dtype).eps if normalize else 0)
    gap = ours.masked_fill(clipped, 0) - theirs
    return gap, gap.masked_fill(clipped, 0)
