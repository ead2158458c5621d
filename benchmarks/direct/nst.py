from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def nst_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    total = student[0].new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        x, y = (functional.normalize(z.flatten(2), dim=2) for z in (s, t))
        total = total + _kernel(y, y).mean().detach() + _kernel(x, x).mean() - 2 * _kernel(x, y).mean()
    return total


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(1) * y.unsqueeze(2)).sum(-1).pow(2)
