import itertools

import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, softmax
from parity.row import Benchmark, IllConditioned, Loss, Memory


def _descending(logits):
    return sorted(logits, key=lambda x: -np.real(x))


def uld_loss(student_logits, teacher_logits):
    values = []
    for s, t in zip(student_logits, teacher_logits, strict=True):
        s = _descending(s)
        # the signs come from real numbers, which are equal if two rows are equal
        p, real, q = softmax(s), softmax(constant(s)), softmax(_descending(constant(t)))
        total = 0.0
        for a, sign_of, b in itertools.zip_longest(p, real, q, fillvalue=0.0):
            total = total + (a - b) * np.sign(sign_of - b)
        values.append(total)
    return values


ROWS = (
    Loss(
        formula=uld_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        shift_invariant=True,
        divergence=True,
        padding=True,
        jumps=True,
        ill_conditioned={
            "logits-of-1e4": IllConditioned(
                {"float64": (256, 256, 64)},
                "a probability of e^-660 has the rounding of 660, and the sum may be no larger",
            )
        },
        memory=Memory(jax=10, torch=12, largest=lambda n: 2 * n.batch[0] * n.classes),  # indices are int64
        benchmarks=(
            Benchmark("128×1000", Sizes((128,), 1000), torch=1.1),
            Benchmark("2×512×32,000", Sizes((2, 512), 32_000), torch=1.1),
        ),
    ),
)
