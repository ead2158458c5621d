import math

import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, unit
from parity.row import Benchmark, Loss, Memory


def correlation_loss(student, teacher, gamma=0.4, order=2):
    s, t = [unit(x) for x in student], [unit(constant(x)) for x in teacher]
    gamma, number = np.longdouble(gamma), len(s)
    factors = [np.exp(-2 * gamma) * (2 * gamma) ** n / math.factorial(n) for n in range(1, int(order) + 1)]

    def gap(i, j):
        a, b = s[i] @ s[j], t[i] @ t[j]
        return sum(factor * (a**n - b**n) for n, factor in enumerate(factors, 1))

    return [sum(gap(i, j) ** 2 for j in range(number)) / number for i in range(number)]


ROWS = (
    Loss(
        formula=correlation_loss,
        inputs={"student": "features", "teacher": "wide_features"},
        learns=("student",),
        constant=("teacher",),
        options=({"gamma": 0.4, "order": 2}, {"gamma": 1.0, "order": 4}),
        ranges={"gamma": (0.1, 2.0)},
        forms={"order": (1, 2, 3, 5)},
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=0.1,  # the square of a difference of kernels, which nearly agree for a small batch
        gradient_scale=2.0**-16,  # for a single example only the oracle's rounding is left
        rounding=scales.of_unit_rows,
        memory=Memory(jax=5, torch=6, largest=lambda n: n.batch[0] * (n.batch[0] + n.dim)),
        collectives=("all-gather", "all-gather", "reduce-scatter"),
        depends_on_threads=True,
        benchmarks=(Benchmark("1024×512", Sizes((1024,), dim=512, teacher_dim=512), torch=1.3),),
    ),
)
