"""From the student's width to the teacher's."""

from __future__ import annotations

import jax
from flax import nnx

from kdjax._typing import Array
from kdjax.nn._heads import BatchNorm, prepared


class Projector(nnx.Module):
    """A learned layer from the student's channels to the teacher's, for losses that need equal shapes.

    For a feature map it is a 1×1 convolution, for vectors and tokens a linear layer; the weights are the same.

    Args:
        in_channels: of the student's map, or the width of its features.
        out_channels: of the teacher's.
        batch_norm: whether a batch norm follows, instead of a bias.
        rngs: of Flax.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import Projector
    >>> projector = Projector(4, 8, rngs=nnx.Rngs(0))
    >>> projector(jnp.ones((2, 6, 6, 4))).shape[-1], projector(jnp.ones((2, 4))).shape[-1]
    (8, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, *, batch_norm: bool = False, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(in_channels, out_channels, use_bias=not batch_norm, rngs=rngs)
        self.norm = BatchNorm(out_channels, momentum=0.9, rngs=rngs) if batch_norm else None
        self.in_channels, self.batch_norm = in_channels, batch_norm

    def __call__(self, x: Array) -> jax.Array:
        """Map a feature map or features to the teacher's width.

        Args:
            x: a map `[batch, height, width, in_channels]`, which has four axes, or features `[*batch, in_channels]`
                with any other number of axes.

        Returns:
            The same with `out_channels`, in float32 or wider.

        Raises:
            TypeError: a different width, or not a floating-point array.
        """
        y = self.linear(prepared("x", x, self.in_channels, maps=getattr(x, "ndim", 0) == 4))
        return y if self.norm is None else self.norm(y)
