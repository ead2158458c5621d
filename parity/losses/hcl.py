import math

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant
from parity.row import Benchmark, Loss, Memory


def hcl_loss(student_maps, teacher_maps):
    """Maps are [batch, channels, height, width]."""
    return [
        sum(_one_map(s[i] - constant(t[i])) for s, t in zip(student_maps, teacher_maps, strict=True))
        for i in range(len(student_maps[0]))
    ]


def _one_map(difference):
    channels, height, width = difference.shape
    levels = [(1.0, height, width)]
    for size in (4, 2, 1):
        if size < height:
            levels.append((levels[-1][0] / 2, size, size))
    value = 0.0
    for weight, rows, columns in levels:
        total = 0.0
        for c in range(channels):
            for r in range(rows):
                for q in range(columns):
                    window = difference[
                        c,
                        r * height // rows : math.ceil((r + 1) * height / rows),
                        q * width // columns : math.ceil((q + 1) * width / columns),
                    ]
                    total = total + (window.sum() / window.size) ** 2
        value = value + weight * total / (channels * rows * columns)
    return value / sum(weight for weight, _, _ in levels)


ROWS = (
    Loss(
        formula=hcl_loss,
        inputs={"student_maps": "maps", "teacher_maps": "maps"},
        learns=("student_maps",),
        constant=("teacher_maps",),
        leading=False,
        divergence=True,
        rounding=scales.of_squares,
        memory=Memory(jax=1, torch=4),
        benchmarks=(
            Benchmark(
                "128, three maps",
                Sizes((128,), maps=((24, 48, 16), (64, 24, 8), (160, 12, 4))),
                torch=1.5,
                jax=1.5,
                memory=0.6,
            ),
        ),
    ),
)
