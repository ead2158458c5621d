from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def attention_transfer_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], p: int = 2) -> Tensor:
    return sum((_attention(s, p) - _attention(t, p)).pow(2).mean() for s, t in zip(student, teacher, strict=True))  # type: ignore[return-value]


def _attention(x: Tensor, p: int) -> Tensor:
    return functional.normalize(x.pow(p).mean(1).flatten(1))
