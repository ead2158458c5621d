"""USKD with its weak head."""

from __future__ import annotations

from torch import Tensor, nn

from kdlosses.settings import non_negative
from kdtorch._typing import ProcessGroup, Reduction
from kdtorch.logits.uskd import uskd_loss
from kdtorch.nn._heads import through


class USKDLoss(nn.Module):
    """`uskd_loss` with its weak head, a linear layer on an intermediate feature of the student.

    Args:
        feature_dim: the width of the feature.
        num_classes: the number of classes.
        alpha: weight of the target part.
        beta: weight of the non-target part.
        mu: weight of the weak head's own cross-entropy.

    Raises:
        ValueError: a negative weight.

    >>> import torch
    >>> from kdtorch.nn import USKDLoss
    >>> loss = USKDLoss(8, 10)
    >>> tuple(loss(torch.ones((2, 8)), torch.zeros((2, 10)), torch.tensor([3, 4])).shape)
    ()
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
    ) -> None:
        super().__init__()
        non_negative(alpha=alpha, beta=beta, mu=mu)
        self.head = nn.Linear(feature_dim, num_classes)
        self.feature_dim, self.alpha, self.beta, self.mu = feature_dim, alpha, beta, mu

    def forward(
        self,
        features: Tensor,
        student_logits: Tensor,
        labels: Tensor,
        *,
        where: Tensor | None = None,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """The loss of a batch; it trains the weak head too.

        Args:
            features: `[*batch, feature_dim]`, of the student.
            student_logits: `[*batch, num_classes]`.
            labels: `[*batch]`, the class of each example, or a distribution `[*batch, num_classes]`.
            where: `[*batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
            group: the process group that the batch is spread over.

        Returns:
            A scalar, or `[*batch]` with `reduction="none"`.

        Raises:
            ValueError: an input or setting that `uskd_loss` does not accept.
            IndexError: a label outside `0 .. num_classes - 1`.
            TypeError: a shape or dtype that does not fit.
        """
        weak_logits = through(self.head, "features", features, self.feature_dim, where=where)
        return uskd_loss(
            student_logits,
            weak_logits,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            mu=self.mu,
            where=where,
            reduction=reduction,
            group=group,
        )
