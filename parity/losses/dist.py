import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, is_left_out, norm, over, softmax, unit
from parity.row import Benchmark, Loss, Memory


def _gap(x, y, eps):
    """1 minus Pearson's correlation, with eps added to the product of the norms.

    It is computed from the difference of the unit vectors, so that a small result keeps its digits.
    """
    x, y = (np.array([v - z[0] for v in z]) for z in (x, y))
    x, y = (z - sum(z) / len(z) for z in (x, y))
    product = norm(x) * norm(y)
    if np.real(product) == 0:
        return 1 - sum(x * y) / (product + eps)
    return (product * sum((a - b) ** 2 for a, b in zip(unit(x), unit(y), strict=True)) / 2 + eps) / (product + eps)


def dist_loss(student_logits, teacher_logits, beta=1.0, gamma=1.0, temperature=1.0, eps=1e-8):
    number, classes = np.shape(student_logits)
    teacher_logits = constant(teacher_logits)
    both = [[*student_logits[:, c], *teacher_logits[:, c]] for c in range(classes)]
    used = [c for c in range(classes) if not all(map(is_left_out, both[c]))]
    p, q = (np.array([softmax(over(row[used], temperature)) for row in z]) for z in (student_logits, teacher_logits))
    rows = sum(_gap(p[i], q[i], eps) for i in range(number)) / number
    columns = sum(_gap(p[:, c], q[:, c], eps) for c in range(len(used))) / len(used)
    return [temperature**2 * (beta * rows + gamma * columns)] * number


ROWS = (
    Loss(
        formula=dist_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"temperature": 4.0}, {"beta": 0.3, "gamma": 2.0, "temperature": 2.0, "eps": 1e-3}),
        ranges={"beta": (0.0, 2.0), "gamma": (0.0, 2.0), "temperature": (0.5, 20.0), "eps": (1e-8, 1e-2)},
        value="batch",
        leading=False,
        batch_coupled=True,
        shift_invariant=True,
        padding=True,
        second_derivative=False,
        depends_on_threads=True,
        memory=Memory(jax=12, torch=16),
        collectives=("all-reduce",) * 10,
        benchmarks=(
            Benchmark("128×1000", Sizes((128,), 1000), torch=1.1, jax=1.2),
            Benchmark("1024×32,000", Sizes((1024,), 32_000), torch=1.1, jax=1.2),
        ),
    ),
)
