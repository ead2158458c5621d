import numpy as np

from parity.losses._plain import constant, softmax
from parity.row import Loss, Memory


def _sign(p, q):
    """The sign of p - q, and 0 if they agree up to rounding."""
    return 0.0 if abs(p - q) <= 1e-17 * q else np.sign(p - q)


def tvd_loss(student_logits, teacher_logits):
    values = []
    for s, t in zip(student_logits, teacher_logits, strict=True):
        p, q = softmax(s), softmax(constant(t))
        signs = map(_sign, softmax(constant(s)), q)
        values.append(sum(sign * (a - b) for sign, a, b in zip(signs, p, q, strict=True)) / 2)
    return values


ROWS = (
    Loss(
        formula=tvd_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        shift_invariant=True,
        divergence=True,
        padding=True,
        jumps=True,
        gradient_scale=2.0**-16,  # if the student is certain, only the oracle's rounding is left
        memory=Memory(jax=5, torch=10),
    ),
)
