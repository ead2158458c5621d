"""VID with its regressor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdlosses.settings import positive
from kdtorch._typing import ProcessGroup, Reduction
from kdtorch.features.vid import vid_loss
from kdtorch.nn._heads import through


class VIDLoss(nn.Module):
    """`vid_loss` with its regressor, three 1×1 convolutions without bias, and its variances.

    The maps of student and teacher must have the same height and width; resize the student's map first if they do not.

    Args:
        in_channels: of the student's map.
        mid_channels: between the convolutions.
        out_channels: of the teacher's map.
        initial_variance: the variance that each channel starts with.
        eps: ε, the smallest variance.

    Raises:
        ValueError: an ε that is not positive, an initial variance that is not larger than ε.

    Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019,
    https://arxiv.org/abs/1904.05835.

    >>> import torch
    >>> from kdtorch.nn import VIDLoss
    >>> loss = VIDLoss(4, 16, 8)
    >>> tuple(loss(torch.ones((2, 4, 6, 6)), torch.zeros((2, 8, 6, 6))).shape)
    ()
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive(initial_variance=initial_variance, eps=eps)
        if not initial_variance > eps:
            raise ValueError(f"`initial_variance` must be greater than `eps` (={eps}), got {initial_variance}")
        self.regressor = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, out_channels, 1, bias=False),
        )
        above = initial_variance - eps
        start = above + math.log(-math.expm1(-above))  # log(e^above - 1)
        self.log_scale = nn.Parameter(torch.full((out_channels,), start))
        self.in_channels, self.initial_variance, self.eps = in_channels, initial_variance, eps

    def forward(
        self,
        student_map: Tensor,
        teacher_map: Tensor,
        *,
        where: Tensor | None = None,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """The loss of a batch; it trains the regressor and the variances too.

        Args:
            student_map: `[batch, in_channels, height, width]`.
            teacher_map: `[batch, out_channels, height, width]`; constant.
            where: `[batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
            group: the process group that the batch is spread over.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: an input or setting that `vid_loss` does not accept.
            TypeError: a shape or dtype that does not fit.
        """
        mean = through(self.regressor, "student_map", student_map, self.in_channels, maps=True, where=where)
        return vid_loss(mean, teacher_map, self.log_scale, eps=self.eps, where=where, reduction=reduction, group=group)
