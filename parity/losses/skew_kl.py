import numpy as np

from parity.losses._plain import constant, expm1, is_left_out, log1p, log_softmax
from parity.row import Loss, Memory


def _log_growth(log_a, log_b, skew):
    """log(m / a) with m = k a + (1 - k) b."""
    if skew == 1 or is_left_out(log_b):
        return np.log(skew) if skew > 0 else -np.inf
    if skew == 0:
        return log_b - log_a
    if np.real(log_b) > np.real(log_a):
        return log_b - log_a + log1p(skew * expm1(log_a - log_b))
    return log1p((1 - skew) * expm1(log_b - log_a))


def skew_kl_loss(student_logits, teacher_logits, skew=0.1):
    values, skew = [], np.longdouble(skew)
    for s, t in zip(student_logits, constant(teacher_logits), strict=True):
        logs = zip(log_softmax(t), log_softmax(s), strict=True)
        values.append(-sum(np.exp(a) * _log_growth(a, b, skew) for a, b in logs if np.exp(a) > 0))
    return values


def skew_reverse_kl_loss(student_logits, teacher_logits, skew=0.1):
    values, skew = [], np.longdouble(skew)
    for s, t in zip(student_logits, constant(teacher_logits), strict=True):
        logs = [(a, b) for a, b in zip(log_softmax(s), log_softmax(t), strict=True) if np.real(np.exp(a)) > 0]
        largest, there = max(logs, key=lambda pair: np.real(pair[0]))
        if 0 < skew < 1 and np.real(largest - there) > 1:
            values.append(-np.log(skew) - sum(_more(a, b, skew) for a, b in logs if not is_left_out(b)))
        else:
            values.append(-sum(np.exp(a) * _log_growth(a, b, skew) for a, b in logs))
    return values


def _more(log_a, log_b, skew):
    """a log(m / (k a)) = a log(1 + o) with o = (1 - k) b / (k a), where b is constant.

    The part a o is constant too, and is added separately: in a sum, its rounding would hide the small derivative.
    """
    log_odds = log_b - log_a + np.log((1 - skew) / skew)
    if np.real(log_odds) > 0:
        return np.exp(log_a) * (log_odds + log1p(np.exp(-log_odds)))
    o = np.exp(log_odds)
    less = o**2 * (o * (o * (o / 5 - 1 / 4) + np.longdouble(1) / 3) - 1 / 2) if np.real(o) < 1e-5 else log1p(o) - o
    return np.exp(log_a) * less + constant(np.exp(log_b)) * (1 - skew) / skew


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
    for formula, memory in ((skew_kl_loss, Memory(jax=9, torch=16)), (skew_reverse_kl_loss, Memory(jax=12, torch=20)))
)
