import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, log_softmax, over, softmax, without
from parity.row import Benchmark, Loss, Memory


def nkd_loss(student_logits, teacher_logits, labels, gamma=1.5, temperature=1.0):
    values = []
    for s, t, label in zip(student_logits, teacher_logits, labels, strict=True):
        t = constant(t)
        y = label if np.ndim(label) == 0 else int(np.argmax(label))
        value = -softmax(t)[y] * log_softmax(s)[y]
        hat_q = softmax(without(over(t, temperature), [y]))
        hat_log_p = log_softmax(without(over(s, temperature), [y]))
        for q, log_p in zip(hat_q, hat_log_p, strict=True):
            if q > 0:
                value = value - gamma * temperature**2 * q * log_p
        values.append(value)
    return values


ROWS = (
    Loss(
        formula=nkd_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits", "labels": "labels"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"gamma": 2.0, "temperature": 2.5}),
        ranges={"gamma": (0.0, 3.0), "temperature": (0.5, 10.0)},
        shift_invariant=True,
        padding=True,
        infinite=True,
        memory=Memory(jax=7, torch=8),
        benchmarks=(Benchmark("128×1000", Sizes((128,), 1000), torch=2.8, jax=4.0, memory=0.75),),
    ),
    Loss(
        formula=nkd_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits", "labels": "distribution"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        ranges={"gamma": (0.0, 3.0), "temperature": (0.5, 10.0)},
        shift_invariant=True,
        infinite=True,
        memory=Memory(jax=6, torch=8),
    ),
)
