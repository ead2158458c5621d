"""CRD with its heads and memories."""

from __future__ import annotations

from typing import Literal

import torch

from kdtorch.nn._contrast import Contrast
from kdtorch.relations.crd import HeldCRDState, crd_init, crd_loss


class CRDLoss(Contrast):
    """`crd_loss` with its two heads and its two memories; negatives are drawn at each call.

    Args:
        student_dim: the width of the student's features.
        teacher_dim: the width of the teacher's features.
        dim: the width of the embeddings.
        num_data: the number of samples in the data set.
        num_negatives: K, the negatives of each sample.
        embed: the heads: `"linear"` or `"none"`.
        temperature: τ.
        momentum: of the memories.
        generator: for memories and negatives; None is PyTorch's global one.

    Raises:
        ValueError: an unknown `embed`; `"none"` with widths that differ; a temperature that is not positive, a momentum
            outside [0, 1], a number below 1.

    >>> import torch
    >>> from kdtorch.nn import CRDLoss
    >>> loss = CRDLoss(8, 6, 4, num_data=50, num_negatives=10)
    >>> tuple(loss(torch.ones((2, 8)), torch.ones((2, 6)), torch.tensor([7, 30])).shape)
    ()
    """

    function, start, held = staticmethod(crd_loss), staticmethod(crd_init), HeldCRDState
    heads = ("linear", "none")

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        dim: int,
        num_data: int,
        *,
        num_negatives: int = 16384,
        embed: Literal["linear", "none"] = "linear",
        temperature: float = 0.07,
        momentum: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        settings = num_negatives, embed, temperature, momentum, generator
        self._build(student_dim, teacher_dim, dim, num_data, *settings)
