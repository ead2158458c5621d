import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, is_left_out, kl, log_softmax, over
from parity.row import Benchmark, Loss, Memory


def _to_mixture(log_p, log_q, weight):
    """KL(p || weight q + (1 - weight) p)."""
    total = 0.0
    for a, b in zip(log_p, log_q, strict=True):
        if is_left_out(a) or np.real(np.exp(a)) == 0:
            continue
        parts = [np.log(1 - weight) + a, *([] if is_left_out(b) else [np.log(weight) + b])]
        largest = max(np.real(x) for x in parts)
        total = total + np.exp(a) * (a - largest - np.log(sum(np.exp(x - largest) for x in parts)))
    return total


def jsd_loss(student_logits, teacher_logits, beta=0.5, temperature=1.0):
    values = []
    for s, t in zip(student_logits, teacher_logits, strict=True):
        x, y = over(s, temperature), over(constant(t), temperature)
        if beta in (0, 1):
            values.append(kl(x, y) if beta else kl(y, x))
            continue
        log_p, log_q, share = log_softmax(x), log_softmax(y), np.longdouble(beta)
        values.append(share * _to_mixture(log_q, log_p, 1 - share) + (1 - share) * _to_mixture(log_p, log_q, share))
    return values


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
        scale=2.0**-16,  # where student and teacher agree the oracle is left with its own rounding
        gradient_scale=2.0**-16,  # where the student is certain the oracle is left with its own rounding
        memory=Memory(jax=8, torch=9),
        benchmarks=(
            Benchmark("128×1000", Sizes((128,), 1000), torch=1.1, jax=1.5, memory=1.0, options={"temperature": 4.0}),
            Benchmark("2×512×32,000", Sizes((2, 512), 32_000), torch=1.1, jax=1.5, memory=0.7),
        ),
    ),
)
