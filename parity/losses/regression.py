import numpy as np

from parity import scales
from parity.losses._plain import constant
from parity.row import Loss, Memory


def bce_loss(student, teacher):
    values = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for x, z in zip(s, constant(t), strict=True):
            # -z log sigmoid(x) - (1 - z) log sigmoid(-x), and -log sigmoid(x) = log(1 + e^-x)
            positive, size = (x, x) if np.real(x) > 0 else (0.0 * x, -x)
            total = total + positive - x * z + np.log(1 + np.exp(-size))
        values.append(total / len(s))
    return values


def mse_loss(student, teacher):
    return [
        sum((x - z) ** 2 for x, z in zip(s, constant(t), strict=True)) / len(s)
        for s, t in zip(student, teacher, strict=True)
    ]


def smooth_l1_loss(student, teacher, beta=1.0):
    values = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for x, z in zip(s, constant(t), strict=True):
            size = x - z if np.real(x) >= z else z - x
            total = total + (size**2 / (2 * beta) if np.real(size) < beta else size - beta / 2)
        values.append(total / len(s))
    return values


ROWS = (
    Loss(
        formula=bce_loss,
        inputs={"student": "features", "teacher": "fractions"},
        learns=("student",),
        constant=("teacher",),
        rounding=scales.of_entries,
        memory=Memory(jax=4, torch=3),
    ),
    Loss(
        formula=mse_loss,
        inputs={"student": "features", "teacher": "features"},
        learns=("student",),
        constant=("teacher",),
        divergence=True,
        rounding=scales.of_squares,
        memory=Memory(jax=1, torch=3),
    ),
    Loss(
        formula=smooth_l1_loss,
        inputs={"student": "features", "teacher": "features"},
        learns=("student",),
        constant=("teacher",),
        options=({}, {"beta": 0.3}),
        ranges={"beta": (0.1, 3.0)},
        divergence=True,
        rounding=scales.of_entries,
        memory=Memory(jax=3, torch=5),
    ),
)
