import math

import torch
from torch import Tensor
from torch.nn import functional


def jsd_loss(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    log_p, log_q = functional.log_softmax(student / temperature, -1), functional.log_softmax(teacher / temperature, -1)
    log_m = torch.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)
    from_teacher = functional.kl_div(log_m, log_q, reduction="none", log_target=True)
    from_student = functional.kl_div(log_m, log_p, reduction="none", log_target=True)
    return (beta * from_teacher + (1 - beta) * from_student).sum(-1).mean()
