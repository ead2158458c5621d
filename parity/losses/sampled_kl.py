import numpy as np

from parity.losses._plain import constant, expm1
from parity.row import Loss, Memory


def sampled_kl_loss(
    student_log_probs,
    teacher_log_probs,
    behavior_log_probs=None,
    estimator="k3",
    sampled_from="student",
    gradient=None,
    max_ratio=None,
):
    values = []
    for i, log_p in enumerate(student_log_probs):
        ratio = log_p - constant(teacher_log_probs[i])
        y = ratio if sampled_from == "student" else -ratio
        estimate = {"k1": y, "k2": y * y / 2, "k3": _beyond(-y)}[estimator]
        if gradient == "score" or (gradient is None and sampled_from == "student"):
            estimate = constant(estimate) + constant(ratio) * (log_p - constant(log_p))
        weight = 1.0 if behavior_log_probs is None else np.exp(constant(log_p) - constant(behavior_log_probs[i]))
        values.append((weight if max_ratio is None else min(weight, max_ratio)) * estimate)
    return values


def _beyond(z):
    """e^z - 1 - z, by its series where the three nearly cancel."""
    if abs(np.real(z)) > 0.5:
        return expm1(z) - z
    total, power = 0.0, z
    for n in range(2, 30):
        power = power * z / n
        total = total + power
    return total


ROWS = (
    Loss(
        formula=sampled_kl_loss,
        inputs={
            "student_log_probs": "log_probs",
            "teacher_log_probs": "log_probs",
            "behavior_log_probs": "log_probs",
        },
        learns=("student_log_probs",),
        constant=("teacher_log_probs", "behavior_log_probs"),
        options=(
            {},
            {"estimator": "k1"},
            {"estimator": "k2", "max_ratio": 1.2},
            {"gradient": "direct"},
            {"estimator": "k1", "gradient": "direct"},
            {"sampled_from": "teacher"},
            {"estimator": "k2", "sampled_from": "teacher", "max_ratio": 0.5},
        ),
        ranges={"max_ratio": (0.5, 20.0)},
        forms={
            "estimator": ("k3", "k1", "k2", "k3", "k3", "k1"),
            "sampled_from": ("student", "student", "student", "teacher", "student", "teacher"),
            "gradient": ("score", "direct", "direct", "direct", "direct", "direct"),
        },
        partly_constant=True,  # the score, and the weight
        memory=Memory(jax=4, torch=16, sizes={"batch": (60_000,)}),
    ),
)
