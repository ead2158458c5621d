from torch import Tensor

from benchmarks.direct._plain import kl


def kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return temperature**2 * kl(teacher / temperature, student / temperature).mean()


def symmetric_kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    s, t = student / temperature, teacher / temperature
    return temperature**2 * (kl(t, s) + kl(s, t)).mean() / 2
