from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def hcl_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    total = student[0].new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        loss, weight, weights = functional.mse_loss(s, t), 1.0, 1.0
        for size in (4, 2, 1):
            if size < s.shape[2]:
                weight /= 2
                weights += weight
                pooled = [functional.adaptive_avg_pool2d(x, size) for x in (s, t)]
                loss = loss + weight * functional.mse_loss(*pooled)
        total = total + loss / weights
    return total
