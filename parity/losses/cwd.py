from parity.kinds import Sizes
from parity.losses._plain import constant, kl, over
from parity.row import Benchmark, Loss, Memory


def cwd_loss(student_map, teacher_map, temperature=1.0):
    """Maps are [batch, channels, height, width]."""
    values = []
    for s, t in zip(student_map, constant(teacher_map), strict=True):
        channels = [kl(over(b.ravel(), temperature), over(a.ravel(), temperature)) for a, b in zip(s, t, strict=True)]
        values.append(temperature**2 * sum(channels) / len(channels))
    return values


ROWS = (
    Loss(
        formula=cwd_loss,
        inputs={"student_map": "map", "teacher_map": "map"},
        learns=("student_map",),
        constant=("teacher_map",),
        options=({}, {"temperature": 4.0}),
        ranges={"temperature": (0.5, 20.0)},
        leading=False,
        divergence=True,
        memory=Memory(jax=5, torch=7),
        benchmarks=(
            Benchmark("8×19×64×128", Sizes((8,), maps=((19, 64, 128),)), torch=1.2),
            Benchmark("32×256×14×14", Sizes((32,), maps=((256, 14, 14),)), torch=1.2),
        ),
    ),
)
