from torch import Tensor
from torch.nn import functional


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    return functional.mse_loss(student @ student.mT, teacher @ teacher.mT)
