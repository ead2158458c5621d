import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, pooled_alike, unit
from parity.row import Benchmark, Loss, Memory


def nst_loss(student_maps, teacher_maps):
    """Maps are [batch, channels, height, width]."""
    return [
        sum(_one_map(s[i], constant(t[i])) for s, t in zip(student_maps, teacher_maps, strict=True))
        for i in range(len(student_maps[0]))
    ]


def _one_map(student, teacher):
    student, teacher = pooled_alike(student, teacher.astype(student.dtype))
    difference = _products(student) - _products(teacher)
    return (difference * difference).sum()


def _products(x):
    """The products of all pairs of positions, averaged over channels, which have unit length over positions."""
    channels = [unit(c / (np.abs(constant(c)).max() or 1)) for c in x.reshape(len(x), -1)]
    return sum(np.outer(u, u) for u in channels) / len(channels)


ROWS = (
    Loss(
        formula=nst_loss,
        inputs={"student_maps": "maps", "teacher_maps": "maps"},
        learns=("student_maps",),
        constant=("teacher_maps",),
        leading=False,
        divergence=True,
        other_maps=((4, 7, 3), (3, 2, 4)),
        rounding=scales.of_unit_channels,
        memory=Memory(jax=6, torch=8, sizes={"maps": ((64, 12, 12),)}),
        benchmarks=(Benchmark("32x256x14x14", Sizes((32,), maps=((256, 14, 14),)), torch=10.0, jax=10.0, memory=0.05),),
    ),
)
