from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, norm, unit
from parity.row import NEAR_ROWS, Benchmark, Loss, Memory


def euclidean_mse_loss(student, teacher):
    s, t = [unit(x) for x in student], [unit(constant(x)) for x in teacher]
    number = len(s)
    return [sum((norm(s[i] - s[j]) - norm(t[i] - t[j])) ** 2 for j in range(number)) / number for i in range(number)]


ROWS = (
    Loss(
        formula=euclidean_mse_loss,
        inputs={"student": "features", "teacher": "wide_features"},
        learns=("student",),
        constant=("teacher",),
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=0.1,  # the square of a difference of distances, which nearly agree for a small batch
        rounding=scales.of_unit_rows,
        ill_conditioned={"near-rows": NEAR_ROWS},
        memory=Memory(jax=5, torch=6, largest=lambda n: n.batch[0] * (n.batch[0] + n.dim)),
        collectives=("all-gather", "all-gather", "reduce-scatter"),
        depends_on_threads=True,
        benchmarks=(Benchmark("1024×512", Sizes((1024,), dim=512, teacher_dim=512), torch=1.4, jax=2.2, memory=1 / 3),),
    ),
)
