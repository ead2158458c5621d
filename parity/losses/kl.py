from parity.oracle._plain import constant, kl, over


def kl_loss(student_logits, teacher_logits, temperature=1.0):
    return [
        temperature**2 * kl(over(constant(t), temperature), over(s, temperature))
        for s, t in zip(student_logits, teacher_logits, strict=True)
    ]


def symmetric_kl_loss(student_logits, teacher_logits, temperature=1.0):
    values = []
    for s, t in zip(student_logits, teacher_logits, strict=True):
        x, y = over(s, temperature), over(constant(t), temperature)
        values.append(temperature**2 * (kl(y, x) + kl(x, y)) / 2)
    return values
