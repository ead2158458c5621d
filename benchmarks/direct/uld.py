from torch import Tensor
from torch.nn import functional


def uld_loss(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = (functional.softmax(x, -1).sort(-1, descending=True).values for x in (student, teacher))
    places = max(p.shape[-1], q.shape[-1])
    p, q = (functional.pad(x, (0, places - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1).mean()
