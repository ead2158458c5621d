import numpy as np

from parity import scales
from parity.losses._plain import constant
from parity.row import Loss, Memory


def ab_loss(student_maps, teacher_maps, *, margin=1.0):
    """Maps are [batch, channels, height, width]."""
    number = len(student_maps)
    return [
        sum(
            np.longdouble(2) ** (k - number + 1) * _one_map(student_maps[k][i], constant(teacher_maps[k][i]), margin)
            for k in range(number)
        )
        for i in range(len(student_maps[0]))
    ]


def _one_map(student, teacher, margin):
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        missing = margin - s if t > 0 else s + margin
        if np.real(missing) > 0:
            total = total + missing * missing
    return total


ROWS = (
    Loss(
        formula=ab_loss,
        inputs={"student_maps": "maps", "teacher_maps": "maps"},
        learns=("student_maps",),
        constant=("teacher_maps",),
        options=({}, {"margin": 0.25}),
        ranges={"margin": (0.1, 10.0)},
        leading=False,
        rounding=scales.of_margins,
        memory=Memory(jax=1, torch=6),
    ),
)
