from parity import scales
from parity.losses._plain import constant, norm, unit
from parity.row import Loss, Memory


def cosine_loss(student, teacher):
    values = []
    for s, t in zip(student, constant(teacher), strict=True):
        # half the squared distance of two unit rows is 1 less their cosine, without the difference; of a zero row it is 1
        zeros = sum(float(norm(constant(x)) == 0) for x in (s, t))
        values.append((sum((a - b) ** 2 for a, b in zip(unit(s), unit(t), strict=True)) + zeros) / 2)
    return values


ROWS = (
    Loss(
        formula=cosine_loss,
        inputs={"student": "features", "teacher": "features"},
        learns=("student",),
        constant=("teacher",),
        scale=2.0**-10,  # of directions that nearly agree though the lengths do not
        gradient_scale=2.0**-8,  # of features of one number the gradient is 0, and rounding is left of its two terms
        rounding=scales.of_unit_rows,
        memory=Memory(jax=6, torch=12),
    ),
)
