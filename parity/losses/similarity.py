import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, unit
from parity.row import Benchmark, Loss, Memory


def similarity_loss(student, teacher):
    s, t = _similarities(student), _similarities(constant(teacher))
    return [sum((a - b) ** 2) / len(student) for a, b in zip(s, t, strict=True)]


def _similarities(x):
    scale = np.abs(constant(x)).max(initial=0) or 1.0
    return [unit([(a / scale) @ (b / scale) for b in x]) for a in x]


ROWS = (
    Loss(
        formula=similarity_loss,
        inputs={"student": "features", "teacher": "wide_features"},
        learns=("student",),
        constant=("teacher",),
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=0.1,  # the square of a difference of similarities, which nearly agree for a small batch
        rounding=scales.of_unit_rows,
        memory=Memory(jax=5, torch=7, largest=lambda n: n.batch[0] * (n.batch[0] + n.dim)),
        collectives=("all-gather", "all-gather", "reduce-scatter"),
        depends_on_threads=True,
        benchmarks=(Benchmark("1024×512", Sizes((1024,), dim=512, teacher_dim=512), torch=1.3),),
    ),
)
