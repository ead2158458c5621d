from parity.kinds import Sizes
from parity.losses._plain import constant, kl, over
from parity.row import Benchmark, Growth, Loss, Memory


def kl_loss(student_logits, teacher_logits, temperature=1.0):
    return [
        temperature**2 * kl(over(constant(t), temperature), over(s, temperature))
        for s, t in zip(student_logits, teacher_logits, strict=True)
    ]


def symmetric_kl_loss(student_logits, teacher_logits, temperature=1.0):
    values = []
    for s, t in zip(student_logits, teacher_logits, strict=True):
        x, y = over(s, temperature), over(constant(t), temperature)
        values.append(temperature**2 * (kl(y, x) + kl(x, y)) / 2)
    return values


ROWS = (
    Loss(
        formula=kl_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"temperature": 4.0}, {"temperature": 20.0}),
        ranges={"temperature": (0.5, 20.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        infinite=True,
        laws=("hot_limit",),
        memory=Memory(jax=5, torch=7),
        benchmarks=(
            Benchmark("128×10", Sizes((128,), 10), torch=0.75),
            Benchmark("128×1000", Sizes((128,), 1000), torch=1.1, jax=1.3, memory=1.0, options={"temperature": 4.0}),
            Benchmark(
                "128×1000, bfloat16", Sizes((128,), 1000), torch=1.1, options={"temperature": 4.0}, dtype="bfloat16"
            ),
            Benchmark("128×1000, mask", Sizes((128,), 1000), torch=1.1, options={"temperature": 4.0}, masked=True),
            Benchmark("2×512×32,000", Sizes((2, 512), 32_000), torch=2.2, jax=2.0, memory=0.7),
            Benchmark("2×512×32,000, bfloat16", Sizes((2, 512), 32_000), torch=1.1, dtype="bfloat16"),
            Benchmark("2×512×32,000, mask", Sizes((2, 512), 32_000), torch=1.1, masked=True),
        ),
        growth=Growth("classes", (100, 1000, 10_000, 100_000), Sizes((128,))),
    ),
    Loss(
        formula=symmetric_kl_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"temperature": 4.0}),
        ranges={"temperature": (0.5, 20.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        infinite=True,
        memory=Memory(jax=5, torch=9),
        benchmarks=(
            Benchmark("128×1000", Sizes((128,), 1000), torch=2.4, jax=1.7, memory=1.0, options={"temperature": 4.0}),
        ),
    ),
)
