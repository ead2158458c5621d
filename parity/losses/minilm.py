import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, kl
from parity.row import Benchmark, Loss, Memory


def minilm_loss(student, teacher, relation_heads, where=None):
    values = []
    for i, (s, t) in enumerate(zip(student, constant(teacher), strict=True)):
        kept = np.arange(len(s)) if where is None else np.flatnonzero(where[i])
        total = 0.0
        for h in range(relation_heads):
            logits_s, logits_t = (_logits(x[kept], h, relation_heads) for x in (s, t))
            for row_s, row_t in zip(logits_s, logits_t, strict=True):
                total = total + kl(row_t, row_s)
        values.append(total / (relation_heads * max(len(kept), 1)))
    return values


def _logits(x, head, heads):
    """The products of all pairs of tokens, by the columns of one head."""
    width = x.shape[1] // heads
    x = x[:, head * width : (head + 1) * width]
    return [[sum(a * b) / np.sqrt(x.dtype.type(width)) for b in x] for a in x]


def _rounding(given):
    """The rounding of products of entries, and of their softmax."""
    size = min(given.largest, 1e90)
    logits = size**2 * np.sqrt(given.inputs["student"].shape[-1])
    return 1 + logits, (1 + logits) * size


ROWS = (
    Loss(
        formula=minilm_loss,
        inputs={"student": "sequences", "teacher": "wide_sequences"},
        learns=("student",),
        constant=("teacher",),
        options=({"relation_heads": 2}, {"relation_heads": 1}),
        forms={"relation_heads": (2, 1)},
        leading=False,
        divergence=True,
        rounding=_rounding,
        memory=Memory(
            jax=10,
            torch=10,
            sizes={"batch": (8,), "dim": 8, "teacher_dim": 16, "positions": 96},
            largest=lambda n: n.batch[0] * n.positions**2,  # the products of one head
        ),
        benchmarks=(
            Benchmark(
                "8×512×768, 12 heads",
                Sizes((8,), dim=384, teacher_dim=384, positions=512),
                torch=1.2,
                jax=1.2,
                memory=1 / 4,
                options={"relation_heads": 12},
            ),
            Benchmark(
                "8×512×768, 48 heads",
                Sizes((8,), dim=384, teacher_dim=384, positions=512),
                torch=1.2,
                jax=1.2,
                memory=1 / 4,
                options={"relation_heads": 48},
            ),
        ),
    ),
)
