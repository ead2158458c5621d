from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


def fsp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    total = student[0].new_zeros(())
    for i in range(len(student) - 1):
        ours, theirs = (_flow(*maps[i : i + 2]) for maps in (student, teacher))
        total = total + (ours - theirs).square().mean()
    return total


def _flow(first: Tensor, second: Tensor) -> Tensor:
    size = tuple(map(min, first.shape[2:], second.shape[2:]))
    first, second = (x if x.shape[2:] == size else adaptive_avg_pool2d(x, size) for x in (first, second))
    # all products of two channels at all positions, then their mean
    return (first.flatten(2).unsqueeze(1) * second.flatten(2).unsqueeze(2)).mean(-1)
