import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant
from parity.row import Benchmark, Loss, Memory


def instance_graph_loss(student, teacher):
    s, t = _edges(student), _edges(constant(teacher))
    return [sum((a - b) ** 2) / len(student) for a, b in zip(s, t, strict=True)]


def _edges(x):
    """The squared distances divided by the largest; of equal ones the first is used."""
    scale = np.abs(constant(x)).max(initial=0) or 1.0
    square = np.array([[sum(((a - b) / scale) ** 2) for b in x] for a in x])
    largest = square.flat[np.argmax(np.real(square))]
    return square / largest if np.real(largest) > 0 else 0 * square


ROWS = (
    Loss(
        formula=instance_graph_loss,
        inputs={"student": "features", "teacher": "wide_features"},
        learns=("student",),
        constant=("teacher",),
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        jumps=True,
        scale=0.1,  # the square of a difference of edges, which nearly agree for a small batch
        rounding=scales.of_spread_rows,
        memory=Memory(jax=5, torch=7, largest=lambda n: n.batch[0] * (n.batch[0] + n.dim)),
        collectives=("all-gather",) * 4 + ("reduce-scatter",),  # for the rows, and for the farthest pairs
        depends_on_threads=True,
        benchmarks=(Benchmark("1024×512", Sizes((1024,), dim=512, teacher_dim=512), torch=1.3),),
    ),
)
