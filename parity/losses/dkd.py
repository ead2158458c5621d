import numpy as np

from parity.oracle._plain import constant, kl, log_softmax, over, without


def _target_and_rest(logits, y):
    """log of the label's probability and of the sum of the others."""
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
