import numpy as np

from parity.oracle._plain import constant, is_left_out, kl, over


def _difference(a, b):
    return [-np.inf if is_left_out(x) or is_left_out(y) else x - y for x, y in zip(a, b, strict=True)]


def difference_kl_loss(student_logits, teacher_logits, temperature=1.0):
    s = [over(x, temperature) for x in student_logits]
    t = [over(x, temperature) for x in constant(teacher_logits)]
    number = len(s)
    values = []
    for i in range(number):
        total = sum(kl(_difference(t[i], t[j]), _difference(s[i], s[j])) for j in range(number) if j != i)
        values.append(temperature**2 * total / number)
    return values
