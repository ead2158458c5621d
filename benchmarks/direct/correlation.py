import math

from torch import Tensor
from torch.nn import functional


def correlation_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    kernels = []
    for x in (student, teacher):
        x = functional.normalize(x)
        cosine = x @ x.T
        terms = (((2 * gamma) ** n / math.factorial(n)) * cosine**n for n in range(order + 1))
        kernels.append(math.exp(-2 * gamma) * sum(terms))
    return functional.mse_loss(*kernels)
