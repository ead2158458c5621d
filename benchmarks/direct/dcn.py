import torch
from torch import Tensor


def dcn_loss(student: Tensor, teacher: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    total = student.new_zeros(())
    for s, t, y in zip(student, teacher, labels, strict=True):
        center = centers[y]
        total = total + 1 - s @ (center / center.norm()) / torch.maximum(s.norm(), t.norm())
    return total / len(student)
