import numpy as np

from parity import scales
from parity.losses._plain import norm, unit
from parity.row import NEAR_ROWS, Loss, Memory


def koleo_loss(student):
    rows = [unit(x) for x in student]
    values = []
    for i, x in enumerate(rows):
        cosines = [np.real(sum(a * b for a, b in zip(x, y, strict=True))) for y in rows]
        others = [j for j in range(len(rows)) if j != i]
        if others:
            largest = max(cosines[j] for j in others)
            nearest = next(j for j in others if cosines[j] >= largest - 1e-17)  # the first but for rounding
            values.append(-np.log(norm(x - rows[nearest] + 1e-8) + 1e-8))
        else:
            values.append(0.0 * x[0])
    return values


ROWS = (
    Loss(
        formula=koleo_loss,
        inputs={"student": "features"},
        learns=("student",),
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=1.0,  # of a logarithm, which may be 0
        rounding=scales.of_unit_rows,
        ill_conditioned={"near-rows": NEAR_ROWS},
        memory=Memory(jax=5, torch=6, largest=lambda n: n.batch[0] ** 2),
        collectives=("all-gather", "reduce-scatter"),
        depends_on_threads=True,
    ),
)
