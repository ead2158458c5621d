from parity import scales
from parity.losses._plain import constant, norm, unit
from parity.row import Loss, Memory


def cosine_loss(student, teacher):
    values = []
    for s, t in zip(student, constant(teacher), strict=True):
        # 1 - cos is half the squared distance of two unit rows, which loses no digits; it is 1 for a row of zeros
        zeros = sum(float(norm(constant(x)) == 0) for x in (s, t))
        values.append((sum((a - b) ** 2 for a, b in zip(unit(s), unit(t), strict=True)) + zeros) / 2)
    return values


ROWS = (
    Loss(
        formula=cosine_loss,
        inputs={"student": "features", "teacher": "features"},
        learns=("student",),
        constant=("teacher",),
        scale=2.0**-10,  # directions that nearly agree, with different lengths
        gradient_scale=2.0**-8,  # for features of one number the gradient is 0, and only rounding is left
        rounding=scales.of_unit_rows,
        memory=Memory(jax=6, torch=12),
    ),
)
