"""Dynamic center-norm loss with its class centres."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax._typing import Array, AxisName, Reduction
from kdjax.features.dcn import dcn_loss


class DynamicCenterNormLoss(nnx.Module):
    """`dcn_loss` with its learned class centres, drawn from a normal distribution.

    Args:
        num_classes: the number of classes.
        dim: the width of the features.
        rngs: of Flax.

    >>> from flax import nnx
    >>> from kdjax.nn import DynamicCenterNormLoss
    >>> DynamicCenterNormLoss(10, 4, rngs=nnx.Rngs(0)).centers.shape
    (10, 4)
    """

    def __init__(self, num_classes: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.centers = nnx.Param(jax.random.normal(rngs.params(), (num_classes, dim), jnp.float32))

    def __call__(
        self,
        student: Array,
        teacher: Array,
        labels: Array,
        *,
        where: Array | None = None,
        reduction: Reduction = "mean",
        axis_name: AxisName | None = None,
    ) -> jax.Array:
        """The loss of a batch.

        Args:
            student: `[*batch, dim]`.
            teacher: the same shape; constant.
            labels: `[*batch]`, the class of each example.
            where: `[*batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
            axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

        Returns:
            A scalar, or `[*batch]` with `reduction="none"`.

        Raises:
            ValueError: an unknown reduction.
            TypeError: a shape or dtype that does not fit.
        """
        return dcn_loss(
            student, teacher, labels, self.centers[...], where=where, reduction=reduction, axis_name=axis_name
        )
