import torch
from torch import Tensor

from benchmarks.direct._plain import kl


def topk_kl_loss(student: Tensor, values: Tensor, indices: Tensor, rest: Tensor, temperature: float = 1.0) -> Tensor:
    s, t = student / temperature, torch.cat([values, rest[..., None]], -1) / temperature
    others = s.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return temperature**2 * kl(t, torch.cat([s.gather(-1, indices), others[..., None]], -1)).mean()
