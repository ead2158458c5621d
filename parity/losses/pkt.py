import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, log1p, norm, unit
from parity.row import NEAR_ROWS, Benchmark, Loss, Memory

EPSILON = 1e-7


def pkt_loss(student, teacher):
    p, q = _probabilities(student), _probabilities(constant(teacher))
    return [
        sum(b * log1p((b - a) / (a + EPSILON)) for a, b in zip(*rows, strict=True)) / len(p)
        for rows in zip(p, q, strict=True)
    ]


def _probabilities(x):
    """1 + cos is computed from the norms and half the square of the sum of two unit rows, without cancellation."""
    units, lengths = [unit(a) for a in x], [norm(a) for a in x]
    rest = [EPSILON / (n + EPSILON) for n in lengths]

    def similarity(i, j):
        share = (1 - rest[i]) * (1 - rest[j])
        both = units[i] + units[j]
        return rest[i] + rest[j] - rest[i] * rest[j] + share * (both @ both) / 2

    rows = [np.array([similarity(i, j) for j in range(len(x))]) for i in range(len(x))]
    return [row / sum(row) for row in rows]


ROWS = (
    Loss(
        formula=pkt_loss,
        inputs={"student": "features", "teacher": "wide_features"},
        learns=("student",),
        constant=("teacher",),
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=0.1,  # the size of the logarithms
        gradient_scale=2.0**-16,  # for a single example only the oracle's rounding is left
        rounding=scales.of_unit_rows,
        ill_conditioned={"near-rows": NEAR_ROWS},
        memory=Memory(jax=6, torch=8, largest=lambda n: n.batch[0] * (n.batch[0] + n.dim)),
        collectives=("all-gather", "all-gather", "reduce-scatter"),
        depends_on_threads=True,
        benchmarks=(Benchmark("1024×512", Sizes((1024,), dim=512, teacher_dim=512), torch=1.3),),
    ),
)
