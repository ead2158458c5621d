import torch
from torch import Tensor
from torch.nn import functional


def _relation(x: Tensor, y: Tensor, eps: float) -> Tensor:
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1) + eps)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    p, q = (functional.softmax(x / temperature, -1) for x in (student, teacher))
    rows, columns = 1 - _relation(p, q, eps).mean(), 1 - _relation(p.T, q.T, eps).mean()
    return temperature**2 * (beta * rows + gamma * columns)
