import numpy as np

from parity import scales
from parity.losses._plain import constant, magnitude, pooled_alike, unit
from parity.row import Loss, Memory


def factor_transfer_loss(student_map, teacher_map, *, p1=1, p2=1, channel_mean=False):
    """Maps are [batch, channels, height, width]."""
    return [
        _one_map(s, constant(t).astype(s.dtype), int(p1), p2, channel_mean)
        for s, t in zip(student_map, teacher_map, strict=True)
    ]


def _one_map(student, teacher, p1, p2, channel_mean):
    student, teacher = pooled_alike(student, teacher)
    difference = _factor(student, p1, channel_mean) - _factor(teacher, p1, channel_mean)
    # entries of unit vectors that are equal but for rounding are equal, where |d| has no gradient
    difference = np.where(np.abs(np.real(difference)) < 8 * np.finfo(np.longdouble).eps, 0, difference)
    whole = int(p2) if p2 == int(p2) else p2
    return sum(magnitude(d) ** whole for d in difference) / len(difference)


def _factor(x, p1, channel_mean):
    """The factor, of unit length; x is divided by a power of two, which changes neither the loss nor any digit."""
    _, exponent = np.frexp(np.abs(constant(x)).max())
    powers = (x / np.ldexp(np.longdouble(1), exponent)) ** p1
    return unit((powers.sum(0) / len(powers) if channel_mean else powers).ravel())


def _rounding(given):
    """For 1 < p2 < 2, the derivative of |d|^p2 at d = 0 turns an error of eps into one of eps^(p2 - 1)."""
    value, gradient = scales.of_unit_maps(given)
    p2 = given.options.get("p2", 1.0)
    return value, gradient * (given.eps ** (p2 - 2) if 1 < p2 < 2 else 1.0)


ROWS = (
    Loss(
        formula=factor_transfer_loss,
        inputs={"student_map": "map", "teacher_map": "map"},
        learns=("student_map",),
        constant=("teacher_map",),
        options=({}, {"p1": 2, "channel_mean": True}, {"p1": 3, "p2": 2.5}),
        forms={"p1": (1, 3, 2, 1), "p2": (1.0, 1.5, 2.0, 3.0), "channel_mean": (False, False, True, True)},
        leading=False,
        divergence=True,
        jumps=True,
        other_maps=((3, 7, 3),),
        rounding=_rounding,
        memory=Memory(jax=5.5, torch=12),
    ),
)
