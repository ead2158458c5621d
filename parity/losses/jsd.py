from parity.kinds import Sizes
from parity.losses._plain import constant, jsd, over
from parity.row import Benchmark, Loss, Memory


def jsd_loss(student_logits, teacher_logits, beta=0.5, temperature=1.0):
    return [
        jsd(over(constant(t), temperature), over(s, temperature), beta)
        for s, t in zip(student_logits, teacher_logits, strict=True)
    ]


ROWS = (
    Loss(
        formula=jsd_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=(
            {},
            {"beta": 0.1, "temperature": 2.0},
            {"beta": 0.9},
            {"beta": 0.0},
            {"beta": 1.0, "temperature": 4.0},
        ),
        ranges={"temperature": (0.5, 20.0)},
        forms={"beta": (0.0, 0.1, 0.5, 1.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        scale=2.0**-16,  # if student and teacher agree, only the oracle's rounding is left
        gradient_scale=2.0**-16,  # if the student is certain, only the oracle's rounding is left
        memory=Memory(jax=8, torch=9),
        depends_on_threads=True,
        benchmarks=(
            Benchmark("128×1000", Sizes((128,), 1000), torch=1.1, jax=1.5, memory=1.0, options={"temperature": 4.0}),
            Benchmark("2×512×32,000", Sizes((2, 512), 32_000), torch=1.1, jax=1.5, memory=0.7),
        ),
    ),
)
