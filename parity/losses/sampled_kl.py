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
        log_q = constant(teacher_log_probs[i])
        z = log_q - log_p if sampled_from == "student" else log_p - log_q
        log_weight, log_product = 0.0, constant(z)
        if behavior_log_probs is not None:
            log_b = constant(behavior_log_probs[i])
            log_weight = constant(log_p) - log_b
            log_product = log_q - log_b if sampled_from == "student" else constant(z) + log_weight
        if max_ratio is not None:
            most = np.log(np.longdouble(max_ratio))
            log_weight, log_product = min(log_weight, most), min(log_product, constant(z) + most)
        weight = np.exp(log_weight)
        estimate = {"k1": -weight * z, "k2": weight * z * z / 2, "k3": _k3(z, weight, log_product)}[estimator]
        if gradient == "score" or (gradient is None and sampled_from == "student"):
            estimate = constant(estimate) - weight * constant(z) * (log_p - constant(log_p))
        values.append(estimate)
    return values


def _k3(z, weight, log_product):
    """w (e^z - 1 - z), for large z from log(w e^z), limited to a number beyond the packages' dtypes; w is constant."""
    if np.real(z) > 1:
        return np.exp(min(log_product, 1e4) + (z - constant(z))) - weight * (1 + z)
    if np.real(z) < -0.5:
        return weight * (expm1(z) - z)
    total, term = 0.0, z
    for n in range(2, 30):  # by the series, because the three terms nearly cancel
        term = term * z / n
        total = total + term
    return weight * total


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
            "estimator": ("k3", "k1", "k3"),
            "sampled_from": ("student", "student", "teacher"),
            "gradient": ("score", "direct", "direct"),
        },
        partly_constant=True,  # the score and the weight are constant
        memory=Memory(jax=4, torch=16, sizes={"batch": (60_000,)}),
    ),
)
