from torch import Tensor
from torch.nn import functional

from kdtorch import DINOState


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    state: DINOState,
    teacher_temperature: float = 0.04,
    student_temperature: float = 0.1,
    center_momentum: float = 0.9,
) -> tuple[Tensor, DINOState]:
    total, pairs = student.new_zeros(()), 0
    targets = functional.softmax((teacher - state.center) / teacher_temperature, -1)
    for u, q in enumerate(targets):
        for v, view in enumerate(student / student_temperature):
            if u != v:
                total = total - (q * functional.log_softmax(view, -1)).sum(-1).mean()
                pairs += 1
    center = center_momentum * state.center + (1 - center_momentum) * teacher.mean((0, 1))
    return total / pairs, DINOState(center)
