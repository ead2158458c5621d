import numpy as np

from parity.losses._plain import constant, is_left_out, log1p, log_softmax
from parity.row import Loss, Memory


def _log_growth(log_a, log_b, skew):
    """log(m / a) with m = k a + (1 - k) b."""
    if skew == 1 or is_left_out(log_b):
        return np.log(skew) if skew > 0 else -np.inf
    if skew == 0:
        return log_b - log_a
    if np.real(log_b) > np.real(log_a):
        return log_b - log_a + log1p(skew * (np.exp(log_a - log_b) - 1))
    return log1p((1 - skew) * (np.exp(log_b - log_a) - 1))


def _kl_to_mixture(logits, others, skew):
    """KL(a || m) of the softmaxes a and b.

    Where b has next to nothing of a's largest class, log(m / a) is log k there. A number that is common to all classes has
    no derivative, and log k is added last, or its rounding would be all that is left of a small derivative.
    """
    logs = [(x, y) for x, y in zip(log_softmax(logits), log_softmax(others), strict=True) if np.real(np.exp(x)) > 0]
    log_a, log_b = max(logs, key=lambda pair: np.real(pair[0]))
    apart = 0 < skew < 1 and np.real(log_a - log_b) > 1
    total = 0.0
    for log_a, log_b in logs:
        if not apart:
            total = total - np.exp(log_a) * _log_growth(log_a, log_b, skew)
        elif not is_left_out(log_b):
            odds = np.log((1 - skew) / skew) + log_b - log_a
            more = odds + log1p(np.exp(-odds)) if np.real(odds) > 0 else log1p(np.exp(odds))
            total = total - np.exp(log_a) * more
    return total - np.log(skew) if apart else total


def skew_kl_loss(student_logits, teacher_logits, skew=0.1):
    return [_kl_to_mixture(t, s, skew) for s, t in zip(student_logits, constant(teacher_logits), strict=True)]


def skew_reverse_kl_loss(student_logits, teacher_logits, skew=0.1):
    return [_kl_to_mixture(s, t, skew) for s, t in zip(student_logits, constant(teacher_logits), strict=True)]


ROWS = tuple(
    Loss(
        formula=formula,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=({}, {"skew": 0.0}, {"skew": 0.5}, {"skew": 1.0}),
        ranges={"skew": (0.0, 1.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        memory=memory,
    )
    for formula, memory in ((skew_kl_loss, Memory(jax=9, torch=16)), (skew_reverse_kl_loss, Memory(jax=12, torch=17)))
)
