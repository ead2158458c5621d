"""USKD with its weak head."""

from __future__ import annotations

import jax
from flax import nnx

from kdjax._typing import Array, AxisName, Reduction
from kdjax.logits.uskd import uskd_loss
from kdjax.nn._heads import through
from kdlosses.settings import non_negative


class USKDLoss(nnx.Module):
    """`uskd_loss` with its weak head, a linear layer on an intermediate feature of the student.

    Args:
        feature_dim: the width of the feature.
        num_classes: the number of classes.
        alpha: weight of the target part.
        beta: weight of the non-target part.
        mu: weight of the weak head's own cross-entropy.
        rngs: of Flax.

    Raises:
        ValueError: a negative weight.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import USKDLoss
    >>> loss = USKDLoss(8, 10, rngs=nnx.Rngs(0))
    >>> loss(jnp.ones((2, 8)), jnp.zeros((2, 10)), jnp.array([3, 4])).shape
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
        rngs: nnx.Rngs,
    ) -> None:
        non_negative(alpha=alpha, beta=beta, mu=mu)
        self.head = nnx.Linear(feature_dim, num_classes, rngs=rngs)
        self.feature_dim, self.alpha, self.beta, self.mu = feature_dim, alpha, beta, mu

    def __call__(
        self,
        features: Array,
        student_logits: Array,
        labels: Array,
        *,
        where: Array | None = None,
        reduction: Reduction = "mean",
        axis_name: AxisName | None = None,
    ) -> jax.Array:
        """The loss of a batch; it trains the weak head too.

        Args:
            features: `[*batch, feature_dim]`, of the student.
            student_logits: `[*batch, num_classes]`.
            labels: `[*batch]`, the class of each example, or a distribution `[*batch, num_classes]`.
            where: `[*batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
            axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

        Returns:
            A scalar, or `[*batch]` with `reduction="none"`.

        Raises:
            ValueError: an input or setting that `uskd_loss` does not accept.
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
            axis_name=axis_name,
        )
