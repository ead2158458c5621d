import torch
from torch import Tensor
from torch.nn import functional


def uskd_loss(
    student: Tensor, weak: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005
) -> Tensor:
    number, classes = student.shape
    label = labels[:, None]
    p, log_p = functional.softmax(student, -1), functional.log_softmax(student, -1)
    w, log_w = functional.softmax(weak, -1), functional.log_softmax(weak, -1)
    square = p.gather(1, label) ** 2
    soft = (1 + square - square.mean(0, keepdim=True)).detach()
    target = -(soft * log_p.gather(1, label)).mean()
    rest = torch.ones_like(student).scatter(1, label, 0).bool()
    score = w / (1 - w.gather(1, label) + 1e-6) + log_p / (1 - log_p.gather(1, label) + 1e-6)
    places = score.detach().sort(dim=-1, descending=True, stable=True).indices
    zipf = (1 / torch.arange(1, classes + 1, dtype=student.dtype)).expand(number, -1)
    zipf = torch.zeros_like(student).scatter(1, places, zipf)[rest].reshape(number, -1)
    zipf = zipf / zipf.sum(-1, keepdim=True)
    others = -(zipf * functional.log_softmax(student[rest].reshape(number, -1), -1)).sum(-1).mean()
    smooth = torch.full_like(weak, 0.1 / classes).scatter(1, label, 0.9 + 0.1 / classes)
    return alpha * target + beta * others - mu * (smooth * log_w).sum(-1).mean()
