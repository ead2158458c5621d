from torch import Tensor
from torch.nn import functional


def alpha_beta_loss(student: Tensor, teacher: Tensor, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    p, q = functional.softmax(student, -1), functional.softmax(teacher, -1)
    total = alpha + beta
    mixed = (q**alpha * p**beta).sum(-1)
    return -(mixed - alpha / total * (q**total).sum(-1) - beta / total * (p**total).sum(-1)).mean() / (alpha * beta)
