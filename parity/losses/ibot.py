import numpy as np

from parity.losses._plain import constant, log_softmax, over, softmax
from parity.losses.dino import ROWS as DINO
from parity.row import Loss, Memory


def ibot_loss(student, teacher, mask, state, teacher_temperature=0.04, student_temperature=0.1, center_momentum=0.9):
    teacher, center = constant(teacher), state["center"]
    values, masked = [], []
    for i in range(len(student)):
        total, number = 0.0, 0
        for j in np.flatnonzero(mask[i]):
            q = softmax(over(teacher[i, j] - center, teacher_temperature))
            log_p = log_softmax(over(student[i, j], student_temperature))
            total = total - sum(a * b for a, b in zip(q, log_p, strict=True) if a > 0)
            number += 1
            masked.append(teacher[i, j])
        values.append(total / max(number, 1))
    if masked:
        center = center_momentum * center + (1 - center_momentum) * np.mean(masked, axis=0)
    return values, {"center": center}


ROWS = (
    Loss(
        formula=ibot_loss,
        inputs={"student": "patches", "teacher": "patches", "mask": "patch_mask", "state": "IBOTState"},
        learns=("student",),
        constant=("teacher",),
        options=DINO[0].options,
        ranges=DINO[0].ranges,
        leading=False,
        shift_invariant=True,
        rounding=DINO[0].rounding,
        state_rounding=DINO[0].state_rounding,
        memory=Memory(jax=4, torch=4),
        collectives=("all-reduce",),
    ),
)
