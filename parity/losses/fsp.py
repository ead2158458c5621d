import math

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant
from parity.row import Benchmark, Loss, Memory


def fsp_loss(student_maps, teacher_maps):
    """Maps are [batch, channels, height, width]."""
    values = []
    for example in range(len(student_maps[0])):
        ours, theirs = ([x[example] for x in maps] for maps in (student_maps, map(constant, teacher_maps)))
        value = 0.0
        for i in range(len(ours) - 1):
            (a, b), (c, d) = (_pooled_alike(*maps[i : i + 2]) for maps in (ours, theirs))
            for j in range(len(a)):
                for k in range(len(b)):
                    flow = (a[j] * b[k]).sum() / a[j].size - (c[j] * d[k]).sum() / c[j].size
                    value = value + flow**2 / (len(a) * len(b))
        values.append(value)
    return values


def _pooled_alike(a, b):
    rows, columns = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
    return [_pooled(x, rows, columns) for x in (a, b)]


def _pooled(x, rows, columns):
    _, height, width = x.shape
    pooled = x[:, :rows, :columns].copy()
    for r in range(rows):
        for q in range(columns):
            window = x[
                :,
                r * height // rows : math.ceil((r + 1) * height / rows),
                q * width // columns : math.ceil((q + 1) * width / columns),
            ]
            pooled[:, r, q] = window.mean((1, 2))
    return pooled


ROWS = (
    Loss(
        formula=fsp_loss,
        inputs={"student_maps": "neighbours", "teacher_maps": "neighbours"},
        learns=("student_maps",),
        constant=("teacher_maps",),
        leading=False,
        divergence=True,
        other_maps=((3, 4, 7), (2, 6, 5)),
        rounding=scales.of_products,
        second_derivative=False,
        memory=Memory(jax=4, torch=8, largest=lambda n: n.batch[0] * (20 * 144 + 21 * 36)),  # both maps side by side
        benchmarks=(Benchmark("32×256×14×14", Sizes((32,), maps=((256, 14, 14),) * 2), torch=10, jax=10, memory=0.05),),
    ),
)
