import numpy as np

from parity.oracle._plain import constant, log_softmax, over, softmax, without


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
