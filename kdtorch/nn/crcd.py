"""CRCD with its heads and memories."""

from __future__ import annotations

from typing import Literal

import torch

from kdtorch.nn._contrast import Contrast
from kdtorch.relations.crcd import HeldCRCDState, crcd_init, crcd_loss


class CRCDLoss(Contrast):
    """`crcd_loss` with its two heads and its two memories; negatives are drawn at each call.

    Args:
        student_dim: the width of the student's features.
        teacher_dim: the width of the teacher's features.
        dim: the width of the embeddings.
        num_data: the number of samples in the data set.
        num_negatives: K, the negatives of each sample.
        embed: the heads: `"linear"`, `"nonlinear"` (three linear layers with ReLUs in between), or `"none"`.
        temperature: τ.
        momentum: of the memories.
        generator: for memories and negatives; None is PyTorch's global one.

    Raises:
        ValueError: an unknown `embed`; `"none"` with widths that differ; a temperature that is not positive, a momentum
            outside [0, 1], a number below 1.

    >>> import torch
    >>> from kdtorch.nn import CRCDLoss
    >>> loss = CRCDLoss(8, 6, 4, num_data=50, num_negatives=10)
    >>> tuple(loss(torch.ones((2, 8)), torch.ones((2, 6)), torch.tensor([7, 30])).shape)
    ()
    """

    function, start, held = staticmethod(crcd_loss), staticmethod(crcd_init), HeldCRCDState
    heads = ("linear", "nonlinear", "none")

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        dim: int,
        num_data: int,
        *,
        num_negatives: int = 500,
        embed: Literal["linear", "nonlinear", "none"] = "linear",
        temperature: float = 0.05,
        momentum: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        settings = num_negatives, embed, temperature, momentum, generator
        self._build(student_dim, teacher_dim, dim, num_data, *settings)
