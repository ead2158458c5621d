import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, magnitude, pooled_alike, unit
from parity.row import Benchmark, Loss, Memory


def attention_transfer_loss(student_maps, teacher_maps, *, p=2):
    """Maps are [batch, channels, height, width]."""
    return [
        sum(_one_map(s[i], constant(t[i]), p) for s, t in zip(student_maps, teacher_maps, strict=True))
        for i in range(len(student_maps[0]))
    ]


def _one_map(student, teacher, p):
    student, teacher = pooled_alike(student, teacher.astype(student.dtype))
    difference = unit(_attention(student, p)) - unit(_attention(teacher, p))
    return sum(d * d for d in difference) / len(difference)


def _attention(x, p):
    """The mean of |x|^p over channels at each position; x is divided by a constant that does not change the loss."""
    largest = np.abs(constant(x)).max() or 1
    whole = int(p) if p == int(p) else p
    return [sum(magnitude(v / largest) ** whole for v in column) / len(column) for column in x.reshape(len(x), -1).T]


ROWS = (
    Loss(
        formula=attention_transfer_loss,
        inputs={"student_maps": "maps", "teacher_maps": "maps"},
        learns=("student_maps",),
        constant=("teacher_maps",),
        options=({}, {"p": 3.0}, {"p": 1.0}, {"p": 2.5}),
        forms={"p": (1.0, 3.5, 2.0, 5.0)},
        leading=False,
        divergence=True,
        other_maps=((4, 7, 3), (3, 2, 4)),
        rounding=scales.of_unit_maps,
        memory=Memory(jax=2, torch=6),
        benchmarks=(
            Benchmark(
                "128, three maps",
                Sizes((128,), maps=((24, 48, 16), (64, 24, 8), (160, 12, 4))),
                torch=1.2,
                jax=2.0,
            ),
        ),
    ),
)
