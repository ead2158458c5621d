import numpy as np

from parity.oracle._plain import constant, log_softmax, over, softmax


def dino_loss(student, teacher, state, teacher_temperature=0.04, student_temperature=0.1, center_momentum=0.9):
    """Views are the first axis."""
    teacher, center = constant(teacher), state["center"]
    views, number = student.shape[:2]
    values = []
    for i in range(number):
        total, pairs = 0.0, 0
        for u in range(len(teacher)):
            q = softmax(over(teacher[u, i] - center, teacher_temperature))
            for v in range(views):
                if u != v:
                    log_p = log_softmax(over(student[v, i], student_temperature))
                    total = total - sum(a * b for a, b in zip(q, log_p, strict=True) if a > 0)
                    pairs += 1
        values.append(total / pairs)
    if number:
        mean = np.array([np.mean([teacher[u, i] for u in range(len(teacher)) for i in range(number)], axis=0)])[0]
        center = center_momentum * center + (1 - center_momentum) * mean
    return values, {"center": center}
