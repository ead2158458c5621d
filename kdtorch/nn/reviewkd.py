"""ReviewKD's connectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlosses.settings import map_size, map_sizes


class ABF(nn.Module):
    """Attention-based fusion, ReviewKD's connector from one level of the student to the teacher's width.

    Args:
        in_channels: of the student's map.
        mid_channels: of the map that is passed to the next level.
        out_channels: of the teacher's map.
        fuse: whether a map of the deeper level is fused in.
        out_shapes: height and width of the teacher's map, or one number for both; None keeps the student's.

    Raises:
        ValueError: a size of `out_shapes` below 1.

    >>> import torch
    >>> from kdtorch.nn import ABF
    >>> connector = ABF(8, 16, 32, False)
    >>> output, fused = connector(torch.ones((2, 8, 4, 4)))
    >>> output.shape[1], fused.shape[1]
    (32, 16)
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        fuse: bool,
        *,
        out_shapes: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None
        self.out_shapes = map_size(out_shapes)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map a map of the student to the teacher's width.

        Args:
            x: `[batch, in_channels, height, width]`, the student's map.
            deeper: the second output of the connector of the deeper level, of any height and width; needed with
                `fuse=True`.

        Returns:
            The map to compare with the teacher's, `[batch, out_channels, height, width]`, and the map to pass to the
            next level, with `mid_channels`; both have the height and width of `out_shapes`, if it was given.

        Raises:
            ValueError: no `deeper` with `fuse=True`.
        """
        x = self.norm1(self.conv1(x))
        if self.attention is not None:
            if deeper is None:
                raise ValueError("`deeper` must be given to a connector with `fuse=True`, got None")
            deeper = _resize(deeper, x.shape[2], x.shape[3])
            weight = self.attention(torch.cat([x, deeper], 1)).sigmoid()
            x = x * weight[:, :1] + deeper * weight[:, 1:]
        if self.out_shapes is not None:
            x = _resize(x, *self.out_shapes)
        return self.norm2(self.conv2(x)), x


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour resizing: each position takes the one at or before it, computed exactly with integers."""
    if x.shape[2:] == (height, width):
        return x
    rows, columns = (torch.arange(n, device=x.device) * m // n for n, m in ((height, x.shape[2]), (width, x.shape[3])))
    return x[:, :, rows][..., columns]


class ReviewKD(nn.Module):
    """The review connectors, which fuse each of the student's maps with the deeper ones and map it to the teacher's width.

    Compare the result with the teacher's maps by `hcl_loss`. Maps may have any sizes. If the teacher's sizes differ
    from the student's, pass them as `out_shapes`; the connectors then work for one resolution of the images. The
    released code resizes in the same way, but lists the sizes from the deepest map on.

    Args:
        in_channels: of the student's maps, from the first to the deepest.
        out_channels: of the teacher's maps, in the same order.
        mid_channels: the width of the fused maps.
        out_shapes: height and width of each of the teacher's maps, or one number for both, in the same order. The maps
            are resized to them by nearest neighbour, as in the released code. None keeps the student's heights and
            widths.

    Raises:
        ValueError: numbers of channels, or `out_shapes`, that differ in length; a size below 1.

    Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021, https://arxiv.org/abs/2104.09044.

    >>> import torch
    >>> from kdtorch.nn import ReviewKD
    >>> review = ReviewKD([4, 8], [16, 32], 8)
    >>> maps = [torch.ones((2, 4, 8, 8)), torch.ones((2, 8, 4, 4))]
    >>> [tuple(x.shape[1:]) for x in review(maps)]  # channels, height, width
    [(16, 8, 8), (32, 4, 4)]
    >>> review = ReviewKD([4, 8], [16, 32], 8, out_shapes=[7, 3])
    >>> [tuple(x.shape[1:]) for x in review(maps)]
    [(16, 7, 7), (32, 3, 3)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        mid_channels: int,
        *,
        out_shapes: Sequence[int | tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        if not in_channels or len(in_channels) != len(out_channels):
            raise ValueError(
                "`in_channels` and `out_channels` must have one entry per map, at least one, got "
                f"{list(in_channels)} and {list(out_channels)}"
            )
        deepest = len(in_channels) - 1
        self.out_shapes = map_sizes(out_shapes, len(in_channels))
        sizes = self.out_shapes or [None] * len(in_channels)
        self.connectors = nn.ModuleList(
            ABF(i, mid_channels, o, level < deepest, out_shapes=size)
            for level, (i, o, size) in enumerate(zip(in_channels, out_channels, sizes, strict=True))
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the student's maps to the teacher's widths.

        Args:
            maps: of the student, `[batch, channels, height, width]`, from the first to the deepest.

        Returns:
            The same number of maps in the same order, with the teacher's channels, and with the heights and widths of
            `out_shapes`, or the student's if it is None.

        Raises:
            ValueError: a different number of maps than of connectors.
        """
        if len(maps) != len(self.connectors):
            raise ValueError(f"`maps` must hold {len(self.connectors)} maps, got {len(maps)}")
        outputs: list[Tensor] = []
        fused = None
        for connector, x in zip(reversed(self.connectors), reversed(maps), strict=True):
            output, fused = connector(x, fused)
            outputs.insert(0, output)
        return outputs
