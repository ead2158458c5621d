"""Activation boundaries: which units are active, with a margin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdtorch._numerics import positive
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked
from kdtorch.features._maps import PROJECTOR, check_maps, check_shapes


@checked
def ab_loss(
    student_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    teacher_maps: Sequence[Float[Tensor, "batch _ _ _"]],
    *,
    margin: Scalar = 1.0,
    channel_axis: int = 1,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Activation boundaries: the student's units should be active where the teacher's are, by a margin.

    $$\sum_{i=1}^n2^{i-n}\sum_k\begin{cases}\max(0,m-s_{ik})^2&\text{if }t_{ik}>0\\\max(0,s_{ik}+m)^2&\text{otherwise}
    \end{cases}$$

    The last of n maps has the weight 1, the one before it ½, and so on. The inner sum is over all entries of a map; it
    is not divided by the number of channels or positions.

    Args:
        student_maps: maps `[batch, channels, height, width]`, any number of them, of any sizes, before the activation
            function, from the first to the deepest.
        teacher_maps: as many, of the same shapes, before the activation function; constant. Only the signs count.
        margin: m > 0; a constant.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`.

    Raises:
        ValueError: no maps, numbers or shapes of maps that differ, a margin that is not positive, a channel axis other than
            1, 2, 3 or its negative, an unknown reduction.
        TypeError: maps that are not a list of four-axis floating-point tensors.

    Heo et al., *Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons*, AAAI 2019,
    https://arxiv.org/abs/1811.03233. The released code multiplies the sum by the loss's weight, 3/1000.

    >>> import torch
    >>> from kdtorch import ab_loss
    >>> s, t = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[2.0, -2.0]]]])
    >>> print(f"{ab_loss([s], [t]):.4f}")
    2.5000
    """
    check_maps(student_maps, teacher_maps, channel_axis)
    check_shapes(student_maps, teacher_maps, PROJECTOR)
    margin = positive("margin", margin, *student_maps, *teacher_maps, constant=True)
    maps = [_ab(*both, margin, where=where) for both in zip(student_maps, teacher_maps, strict=True)]
    weighted = [value * 2.0 ** (1 + i - len(maps)) for i, value in enumerate(maps)]
    return reduce(torch.stack(weighted).sum(0), where, reduction, group)


def ab_and_gradient(x: Tensor, y: Tensor, margin: Scalar) -> tuple[Tensor, Tensor]:
    """The sum of max(0, margin - sign · x)^2, where the sign is 1 for y > 0 and -1 otherwise, and its gradient."""
    sign = torch.where(y > 0, 1, torch.where(y.isnan(), y, -1))
    missing = margin - sign * x
    missing = torch.where(missing <= 0, 0, missing)
    return missing.square().sum((1, 2, 3)), -2 * sign * missing


_ab = rowwise(ab_and_gradient, axes=3)
