import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.direct._plain import kl


def dkd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    s, t = student / temperature, teacher / temperature
    label = functional.one_hot(labels, s.shape[-1])
    p_y, q_y = ((functional.softmax(x, -1) * label).sum(-1) for x in (s, t))
    p_rest, q_rest = ((functional.softmax(x, -1) * (1 - label)).sum(-1) for x in (s, t))
    p, q = torch.stack([p_y, p_rest], -1), torch.stack([q_y, q_rest], -1)
    target = functional.kl_div(p.log(), q, reduction="none").sum(-1)
    others = kl(t - 1000.0 * label, s - 1000.0 * label)
    return temperature**2 * (alpha * target + beta * others).mean()
