"""From the student's width to the teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from kdtorch.nn._heads import prepared


class Projector(nn.Module):
    """A learned layer from the student's channels to the teacher's, for losses that need equal shapes.

    For a feature map it is a 1×1 convolution, for vectors and tokens a linear layer; the weights are the same.

    Args:
        in_channels: of the student's map, or the width of its features.
        out_channels: of the teacher's.
        batch_norm: whether a batch norm follows, instead of a bias.

    >>> import torch
    >>> from kdtorch.nn import Projector
    >>> projector = Projector(4, 8)
    >>> projector(torch.ones((2, 4, 6, 6))).shape[1], projector(torch.ones((2, 4))).shape[-1]
    (8, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=not batch_norm)
        self.norm = nn.BatchNorm1d(out_channels) if batch_norm else None
        self.in_channels, self.batch_norm = in_channels, batch_norm

    def forward(self, x: Tensor) -> Tensor:
        """Map a feature map or features to the teacher's width.

        Args:
            x: a map `[batch, in_channels, height, width]`, which has four axes, or features `[*batch, in_channels]`
                with any other number of axes.

        Returns:
            The same with `out_channels`, in float32 or wider.

        Raises:
            TypeError: a different width, or not a floating-point tensor.
        """
        maps = getattr(x, "ndim", 0) == 4
        x = prepared(self, "x", x, self.in_channels, maps=maps)
        y = self.linear(x.movedim(1, -1) if maps else x)
        if self.norm is not None:
            y = self.norm(y.flatten(0, -2)).view(y.shape)
        return y.movedim(-1, 1) if maps else y
