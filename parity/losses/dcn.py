import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, norm, unit
from parity.row import Benchmark, Loss, Memory


def dcn_loss(student, teacher, labels, centers):
    values = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        length, other = norm(s), norm(constant(t))
        largest = length if np.real(length) >= other else other
        value = sum(a * b for a, b in zip(s, unit(centers[y]), strict=True))
        values.append(1 - (value / largest if np.real(largest) > 0 else 0.0))
    return values


ROWS = (
    Loss(
        formula=dcn_loss,
        inputs={"student": "features", "teacher": "features", "labels": "labels", "centers": "centers"},
        learns=("student", "centers"),
        constant=("teacher",),
        scale=1.0,  # one minus a cosine
        rounding=scales.of_unit_rows,
        memory=Memory(
            jax=1, torch=2, sizes={"classes": 4000, "dim": 8}, largest=lambda n: (n.batch[0] + n.classes) * n.dim
        ),
        benchmarks=(
            Benchmark("1024×512, 1,000 classes", Sizes((1024,), 1000, 512), torch=25, jax=110, compiles=False),
            Benchmark("256×512, 50,000 classes", Sizes((256,), 50_000, 512), torch=240, jax=240, compiles=False),
        ),
    ),
)
