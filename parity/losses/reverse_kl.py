from parity.kinds import Sizes
from parity.losses._plain import constant, kl, over
from parity.row import Benchmark, Growth, Loss, Memory


def reverse_kl_loss(student_logits, teacher_logits, temperature=1.0):
    return [
        temperature**2 * kl(over(s, temperature), over(constant(t), temperature))
        for s, t in zip(student_logits, teacher_logits, strict=True)
    ]


ROWS = (
    Loss(
        formula=reverse_kl_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"temperature": 4.0}, {"temperature": 20.0}),
        ranges={"temperature": (0.5, 20.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        gradient_scale=2.0**-16,  # if the student is certain, only the oracle's rounding is left
        memory=Memory(jax=5, torch=8),
        depends_on_threads=True,
        benchmarks=(
            Benchmark("128×1000", Sizes((128,), 1000), torch=1.1, jax=1.5, memory=1.0, options={"temperature": 4.0}),
            Benchmark("2×512×32,000", Sizes((2, 512), 32_000), torch=1.1, jax=1.5, memory=0.7),
        ),
        growth=Growth("classes", (100, 1000, 10_000, 100_000), Sizes((128,))),
    ),
)
