import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, kl, log_softmax, over, without
from parity.row import Benchmark, Loss, Memory


def _target_and_rest(logits, y):
    """The logarithms of the label's probability and of the sum of the others."""
    logs = log_softmax(logits)
    others = without(logs, [y])
    largest = max(np.real(x) for x in others)
    if np.isneginf(largest):
        return [logs[y], -np.inf]
    return [logs[y], largest + np.log(sum(np.exp(x - largest) for x in others))]


def dkd_loss(student_logits, teacher_logits, labels, alpha=1.0, beta=8.0, temperature=4.0):
    values = []
    for s, t, y in zip(student_logits, teacher_logits, labels, strict=True):
        x, z = over(s, temperature), over(constant(t), temperature)
        target = kl(_target_and_rest(z, y), _target_and_rest(x, y))
        others = kl(without(z, [y]), without(x, [y]))
        values.append(temperature**2 * (alpha * target + beta * others))
    return values


ROWS = (
    Loss(
        formula=dkd_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits", "labels": "labels"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"alpha": 1.0, "beta": 1.0, "temperature": 1.0}, {"alpha": 0.3, "beta": 0.0, "temperature": 2.0}),
        ranges={"alpha": (0.0, 2.0), "beta": (0.0, 10.0), "temperature": (0.5, 20.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        infinite=True,
        laws=("dkd_is_kl",),
        memory=Memory(jax=5, torch=8),
        depends_on_threads=True,
        benchmarks=(Benchmark("128×1000", Sizes((128,), 1000), torch=2.2, jax=3.5, memory=0.7),),
    ),
)
