from torch import Tensor

from benchmarks.direct._plain import kl


def reverse_kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return temperature**2 * kl(student / temperature, teacher / temperature).mean()
