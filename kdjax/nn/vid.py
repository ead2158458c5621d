"""VID with its regressor."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax._typing import Array, AxisName, Reduction
from kdjax.features.vid import vid_loss
from kdjax.nn._heads import through
from kdlosses.settings import positive


class VIDLoss(nnx.Module):
    """`vid_loss` with its regressor, three 1×1 convolutions without bias, and its variances.

    The maps of student and teacher must have the same height and width; resize the student's map first if they do not.

    Args:
        in_channels: of the student's map.
        mid_channels: between the convolutions.
        out_channels: of the teacher's map.
        initial_variance: the variance that each channel starts with.
        eps: ε, the smallest variance.
        rngs: of Flax.

    Raises:
        ValueError: an ε that is not positive, an initial variance that is not larger than ε.

    Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019,
    https://arxiv.org/abs/1904.05835.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import VIDLoss
    >>> loss = VIDLoss(4, 16, 8, rngs=nnx.Rngs(0))
    >>> loss(jnp.ones((2, 6, 6, 4)), jnp.zeros((2, 6, 6, 8))).shape
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
        rngs: nnx.Rngs,
    ) -> None:
        positive(initial_variance=initial_variance, eps=eps)
        if not initial_variance > eps:
            raise ValueError(f"`initial_variance` must be greater than `eps` (={eps}), got {initial_variance}")
        self.regressor = nnx.Sequential(
            nnx.Conv(in_channels, mid_channels, (1, 1), use_bias=False, rngs=rngs),
            nnx.relu,
            nnx.Conv(mid_channels, mid_channels, (1, 1), use_bias=False, rngs=rngs),
            nnx.relu,
            nnx.Conv(mid_channels, out_channels, (1, 1), use_bias=False, rngs=rngs),
        )
        above = initial_variance - eps
        start = above + math.log(-math.expm1(-above))  # log(e^above - 1)
        self.log_scale = nnx.Param(jnp.full(out_channels, start, jnp.float32))
        self.in_channels, self.initial_variance, self.eps = in_channels, initial_variance, eps

    def __call__(
        self,
        student_map: Array,
        teacher_map: Array,
        *,
        where: Array | None = None,
        reduction: Reduction = "mean",
        axis_name: AxisName | None = None,
    ) -> jax.Array:
        """The loss of a batch; it trains the regressor and the variances too.

        Args:
            student_map: `[batch, height, width, in_channels]`.
            teacher_map: `[batch, height, width, out_channels]`; constant.
            where: `[batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
            axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: an input or setting that `vid_loss` does not accept.
            TypeError: a shape or dtype that does not fit.
        """
        mean = through(self.regressor, "student_map", student_map, self.in_channels, maps=True, where=where)
        scale = self.log_scale[...]
        return vid_loss(mean, teacher_map, scale, eps=self.eps, where=where, reduction=reduction, axis_name=axis_name)
