"""Dynamic center-norm loss with its class centres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdtorch._typing import ProcessGroup, Reduction
from kdtorch.features.dcn import dcn_loss


class DynamicCenterNormLoss(nn.Module):
    """`dcn_loss` with its learned class centres, drawn from a normal distribution.

    Args:
        num_classes: the number of classes.
        dim: the width of the features.

    >>> from kdtorch.nn import DynamicCenterNormLoss
    >>> tuple(DynamicCenterNormLoss(10, 4).centers.shape)
    (10, 4)
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, dim))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        *,
        where: Tensor | None = None,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student: `[*batch, dim]`.
            teacher: the same shape; constant.
            labels: `[*batch]`, the class of each example.
            where: `[*batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
            group: the process group that the batch is spread over.

        Returns:
            A scalar, or `[*batch]` with `reduction="none"`.

        Raises:
            ValueError: an unknown reduction.
            IndexError: a label outside `0 .. num_classes - 1`.
            TypeError: a shape or dtype that does not fit.
        """
        return dcn_loss(student, teacher, labels, self.centers, where=where, reduction=reduction, group=group)
