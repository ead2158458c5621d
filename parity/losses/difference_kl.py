import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, is_left_out, kl, over
from parity.row import Benchmark, Growth, Loss, Memory


def _difference(a, b):
    return [-np.inf if is_left_out(x) or is_left_out(y) else x - y for x, y in zip(a, b, strict=True)]


def difference_kl_loss(student_logits, teacher_logits, temperature=1.0):
    s = [over(x, temperature) for x in student_logits]
    t = [over(x, temperature) for x in constant(teacher_logits)]
    number = len(s)
    values = []
    for i in range(number):
        total = sum(kl(_difference(t[i], t[j]), _difference(s[i], s[j])) for j in range(number) if j != i)
        values.append(temperature**2 * total / number)
    return values


ROWS = (
    Loss(
        formula=difference_kl_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"temperature": 2.5}),
        ranges={"temperature": (0.5, 20.0)},
        leading=False,
        batch_coupled=True,
        shift_invariant=True,
        divergence=True,
        padding=True,
        second_derivative=False,
        # float64 arrays if the products of exponentials exceed float32, and blocks of rows if they exceed float64
        memory=Memory(
            jax=10,
            torch=10,
            largest=lambda n: 2 * (n.batch[0] ** 2 + n.batch[0] * n.classes),
            factors=(1.0, 10.0, 300.0),
        ),
        collectives=("all-gather", "all-gather", "reduce-scatter"),
        depends_on_threads=True,
        benchmarks=(
            Benchmark("256×1000", Sizes((256,), 1000), torch=110, jax=220, memory=1 / 90),
            Benchmark("256×1000 ±200", Sizes((256,), 1000), torch=4, jax=30, memory=1 / 35, factor=70 / 3),
        ),
        growth=Growth("batch", (16, 32, 64, 128, 256), Sizes(classes=1000)),
    ),
)
