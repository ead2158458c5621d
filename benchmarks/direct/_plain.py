"""Shared by the direct forms."""

from torch import Tensor
from torch.nn import functional


def kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student))."""
    log_p, q = functional.log_softmax(student_logits, -1), functional.softmax(teacher_logits, -1)
    return functional.kl_div(log_p, q, reduction="none").sum(-1)
