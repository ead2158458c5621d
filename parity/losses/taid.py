import numpy as np

from parity.losses._plain import constant, is_left_out, kl
from parity.row import Loss, Memory


def _between(s, t, interpolation):
    """(1 - λ) s + λ t, where 0 times -inf is 0."""
    share = np.longdouble(interpolation)
    parts = [(1 - share, s), (share, t)]
    return sum(weight * x for weight, x in parts if weight > 0)


def taid_loss(student_logits, teacher_logits, interpolation):
    values = []
    for s, t in zip(student_logits, constant(teacher_logits), strict=True):
        target = [_between(constant(x), y, interpolation) for x, y in zip(s, t, strict=True)]
        values.append(kl(target, s) if not all(map(is_left_out, t)) else float("nan"))
    return values


ROWS = (
    Loss(
        formula=taid_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({"interpolation": 0.4}, {"interpolation": 0.0}, {"interpolation": 0.9}, {"interpolation": 1.0}),
        ranges={"interpolation": (0.0, 1.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        partly_constant=True,
        scale=2.0**-16,  # if the target is the student, only the oracle's rounding is left
        gradient_scale=2.0**-16,
        memory=Memory(jax=9, torch=18),
    ),
)
