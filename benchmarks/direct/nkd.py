import torch
from torch import Tensor
from torch.nn import functional


def nkd_loss(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0) -> Tensor:
    number, classes = student.shape
    log_p, q = functional.log_softmax(student, -1), functional.softmax(teacher, -1)
    target = -q.gather(1, labels[:, None]) * log_p.gather(1, labels[:, None])
    rest = torch.ones_like(student).scatter(1, labels[:, None], 0).bool()
    s, t = (x[rest].reshape(number, classes - 1) / temperature for x in (student, teacher))
    others = -(functional.softmax(t, -1) * functional.log_softmax(s, -1)).sum(-1)
    return target.mean() + gamma * temperature**2 * others.mean()
