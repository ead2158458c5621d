import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn_knopp(teacher_logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    assignments = (teacher_logits / temperature).exp().t()
    prototypes, samples = assignments.shape
    assignments /= assignments.sum()
    for _ in range(iterations):
        assignments /= assignments.sum(1, keepdim=True)
        assignments /= prototypes
        assignments /= assignments.sum(0, keepdim=True)
        assignments /= samples
    assignments *= samples
    return assignments.t()
