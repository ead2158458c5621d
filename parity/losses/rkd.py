import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, norm, unit
from parity.row import NEAR_ROWS, Benchmark, Loss, Memory


def rkd_loss(student, teacher, distance_weight=25.0, angle_weight=50.0):
    (d, sides), (e, others) = _relations(student), _relations(constant(teacher))
    number, value = len(d), []
    for i in range(number):
        distances = sum(_huber(d[i][j] - e[i][j]) for j in range(number)) / number
        angles = sides[i] @ sides[i].T - others[i] @ others[i].T
        angles = sum(_huber(x) for x in angles.flat) / number**2
        value.append(distance_weight * distances + angle_weight * angles)
    return value


def _relations(x):
    """The distances divided by their mean, and for each row the unit differences of all rows from it."""
    number = len(x)
    scale = np.abs(constant(x)).max(initial=0) or 1.0
    distance = np.array([[norm((a - b) / scale) for b in x] for a in x])
    mean = distance.sum() / max(number * (number - 1), 1)
    distance = distance / mean if np.real(mean) > 0 else 0 * distance
    return distance, [np.array([unit((b - a) / scale) for b in x]) for a in x]


def _huber(x):
    size = x if np.real(x) > 0 else -x
    return x * x / 2 if np.real(size) < 1 else size - 0.5


ROWS = (
    Loss(
        formula=rkd_loss,
        inputs={"student": "features", "teacher": "wide_features"},
        learns=("student",),
        constant=("teacher",),
        options=({"distance_weight": 25.0, "angle_weight": 50.0}, {"distance_weight": 1.0, "angle_weight": 0.0}),
        ranges={"distance_weight": (0.0, 30.0), "angle_weight": (0.0, 60.0)},
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=1.0,
        rounding=scales.of_near_rows,
        ill_conditioned={"near-rows": NEAR_ROWS},
        memory=Memory(jax=15, torch=9, largest=lambda n: n.batch[0] * (n.batch[0] + n.dim)),
        collectives=("all-gather", "all-gather", "reduce-scatter"),
        depends_on_threads=True,
        benchmarks=(
            Benchmark("192×256", Sizes((192,), dim=256, teacher_dim=256), torch=8.0, jax=3.0, memory=1 / 3),
            Benchmark("512×512", Sizes((512,), dim=512, teacher_dim=512), torch=8.0, jax=3.0, memory=1 / 3),
            Benchmark("2048×512", Sizes((2048,), dim=512, teacher_dim=512), direct=False),
        ),
    ),
)
