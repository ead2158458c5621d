import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, log_softmax, over, softmax
from parity.row import Benchmark, Loss, Memory


def dino_loss(student, teacher, state, teacher_temperature=0.04, student_temperature=0.1, center_momentum=0.9):
    """Views are the first axis."""
    teacher, center = constant(teacher), state["center"]
    views, number = student.shape[:2]
    values = []
    for i in range(number):
        total, pairs = 0.0, 0
        for u in range(len(teacher)):
            q = softmax(over(teacher[u, i] - center, teacher_temperature))
            for v in range(views):
                if u != v:
                    log_p = log_softmax(over(student[v, i], student_temperature))
                    total = total - sum(a * b for a, b in zip(q, log_p, strict=True) if a > 0)
                    pairs += 1
        values.append(total / pairs)
    if number:
        mean = np.array([np.mean([teacher[u, i] for u in range(len(teacher)) for i in range(number)], axis=0)])[0]
        center = center_momentum * center + (1 - center_momentum) * mean
    return values, {"center": center}


def _rounding(given):
    """The rounding of logits that are divided by both temperatures."""
    largest = max(given.largest, scales.size(given.inputs["state"]["center"]))
    sharpness = 1 / given.options["student_temperature"]
    spread = largest / given.options["teacher_temperature"] + largest * sharpness
    return 1 + largest * sharpness * (1 + spread), sharpness * (1 + spread)


ROWS = (
    Loss(
        formula=dino_loss,
        inputs={"student": "views", "teacher": "teacher_views", "state": "DINOState"},
        learns=("student",),
        constant=("teacher",),
        options=({}, {"teacher_temperature": 0.07, "student_temperature": 0.3, "center_momentum": 0.5}),
        ranges={
            "teacher_temperature": (0.04, 0.1),
            "student_temperature": (0.05, 0.5),
            "center_momentum": (0.0, 0.99),
        },
        leading=False,
        shift_invariant=True,
        rounding=_rounding,
        state_rounding=lambda given, value: scales.size(given.inputs["teacher"]),  # a mean that may nearly cancel
        memory=Memory(jax=2, torch=3, sizes={"dim": 3000}),
        collectives=("all-reduce",),
        benchmarks=(
            Benchmark("2+8, 32×16,384", Sizes((32,), dim=16_384, views=10), torch=2, jax=2, memory=1 / 2.2),
            Benchmark("2+8, 32×32,768", Sizes((32,), dim=32_768, views=10), torch=4, jax=4, memory=1 / 2.2),
            Benchmark("2+8, 64×65,536", Sizes((64,), dim=65_536, views=10), torch=2.5, jax=4, memory=1 / 2.2),
        ),
    ),
)
