from torch import Tensor
from torch.nn.functional import kl_div


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    s, t = ((x.flatten(2) / temperature).softmax(-1) for x in (student, teacher))
    return temperature**2 * kl_div(s.log(), t, reduction="sum") / (s.shape[0] * s.shape[1])
