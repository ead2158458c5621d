import numpy as np

from parity.arrays import HALVES
from parity.kinds import Sizes
from parity.losses._plain import norm, unit
from parity.row import NEAR_ROWS, Benchmark, IllConditioned, Loss, Memory


def koleo_loss(student):
    rows = [unit(x) for x in student]
    values = []
    for i, x in enumerate(rows):
        cosines = [np.real(sum(a * b for a, b in zip(x, y, strict=True))) for y in rows]
        others = [j for j in range(len(rows)) if j != i]
        if others:
            largest = max(cosines[j] for j in others)
            nearest = next(j for j in others if cosines[j] >= largest - 1e-17)  # the first, up to rounding
            values.append(-np.log(norm(x - rows[nearest] + 1e-8) + 1e-8))
        else:
            values.append(0.0 * x[0])
    return values


def _rounding(given):
    """The rounding of unit rows. The gradient grows as a row gets shorter, and as its neighbour gets closer."""
    x = np.nan_to_num(given.inputs["student"]).astype(np.longdouble)
    largest = np.abs(x).max(-1, keepdims=True)
    x = x / np.where(largest < given.tiny, np.inf, largest)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    x = x / np.where(length == 0, 1, length)
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(x) for b in x[:i]]
    shortest = min((float(a) for a in largest.ravel() if a >= given.tiny), default=1.0)
    nearness = 1 / (min(gaps, default=1.0) + 1e-8)
    return nearness, nearness / shortest


ROWS = (
    Loss(
        formula=koleo_loss,
        inputs={"student": "features"},
        learns=("student",),
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=1.0,  # the value is a logarithm, which may be 0
        rounding=_rounding,
        first_of_ties=True,
        ill_conditioned={
            "near-rows": IllConditioned(NEAR_ROWS.bounds | dict.fromkeys(HALVES, (128, 2, 64)), NEAR_ROWS.why),
            "equal-rows": IllConditioned({}, "the terms of two equal rows, of 1 / ε each, cancel", 1e8),
        },
        memory=Memory(jax=5, torch=6, largest=lambda n: n.batch[0] ** 2),
        collectives=("all-gather", "reduce-scatter"),
        depends_on_threads=True,
        benchmarks=(Benchmark("1024×1024", Sizes((1024,), dim=1024)),),
    ),
)
