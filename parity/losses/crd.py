import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, log1p, unit
from parity.losses.crcd import remembered
from parity.row import Benchmark, Growth, Loss, Memory


def crd_loss(student, teacher, index, negatives, state, temperature=0.07, momentum=0.5):
    v, u = [unit(x) for x in student], [unit(x) for x in teacher]
    on_student, student_normalizer = _side(
        v, index, negatives, state["teacher_memory"], state["student_normalizer"], temperature
    )
    on_teacher, teacher_normalizer = _side(
        u, index, negatives, state["student_memory"], state["teacher_normalizer"], temperature
    )
    after = {
        "student_memory": remembered(state["student_memory"], index, v, momentum),
        "teacher_memory": remembered(state["teacher_memory"], index, u, momentum),
        "student_normalizer": student_normalizer,
        "teacher_normalizer": teacher_normalizer,
    }
    return [a + b for a, b in zip(on_student, on_teacher, strict=True)], after


def _side(embedding, index, negatives, memory, normalizer, temperature):
    number, num_data = len(embedding), len(memory)
    noise = negatives.shape[1] / num_data
    weights = np.empty((number, negatives.shape[1] + 1), dtype=np.result_type(*embedding, memory))
    for i in range(number):
        for k, place in enumerate([index[i], *negatives[i]]):
            weights[i, k] = np.exp(sum(embedding[i] * memory[place]) / temperature)
    if normalizer == 0 and number:
        normalizer = constant(weights).mean() * num_data
    values = []
    for x in weights / normalizer:
        values.append(log1p((noise + 1e-7) / x[0]) + sum(log1p((x[k] + 1e-7) / noise) for k in range(1, len(x))))
    return values, normalizer


def _rounding(given):
    """The rounding of unit rows, divided by the temperature."""
    value, gradient = scales.of_unit_rows(given)
    steepness = 1 / given.options["temperature"]
    return steepness * value, steepness * gradient


ROWS = (
    Loss(
        formula=crd_loss,
        inputs={
            "student": "features",
            "teacher": "features",
            "index": "index",
            "negatives": "negatives",
            "state": "CRDState",
        },
        learns=("student", "teacher"),
        options=({}, {"temperature": 0.2, "momentum": 0.9}),
        ranges={"temperature": (0.05, 1.0), "momentum": (0.0, 0.99)},
        leading=False,
        batch_coupled=True,  # through a normaliser that is not set yet
        second_derivative=False,
        rounding=_rounding,
        # the normaliser is a mean of exp(x / temperature)
        state_rounding=lambda given, value: scales.size(value) * 0.05 / given.options["temperature"],
        memory=Memory(jax=6, torch=6, largest=lambda n: max(n.batch[0] * (n.negatives + 1), n.num_data * n.dim)),
        collectives=("all-gather",) * 6,
        benchmarks=(
            Benchmark(
                "64×128, K 16,384, 50,000 rows",
                Sizes((64,), dim=128, num_data=50_000, negatives=16_384),
                torch=3,
                jax=3,
                memory=1 / 8,
            ),
        ),
        growth=Growth("negatives", (256, 1024, 4096, 16_384), Sizes((32,), dim=128, num_data=20_000)),
    ),
)
