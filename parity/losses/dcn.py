import numpy as np

from parity.oracle._plain import constant, norm, unit


def dcn_loss(student, teacher, labels, centers):
    values = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        length, other = norm(s), norm(constant(t))
        largest = length if np.real(length) >= other else other
        value = sum(a * b for a, b in zip(s, unit(centers[y]), strict=True))
        values.append(1 - (value / largest if np.real(largest) > 0 else 0.0))
    return values
