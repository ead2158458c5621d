import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, expm1, is_left_out, log_softmax
from parity.row import Benchmark, Loss, Memory


def alpha_beta_loss(student_logits, teacher_logits, alpha=0.5, beta=0.5):
    values = []
    for s, t in zip(student_logits, constant(teacher_logits), strict=True):
        total = 0.0
        for log_q, log_p in zip(log_softmax(t), log_softmax(s), strict=True):
            if is_left_out(log_p) and is_left_out(log_q):
                continue
            if np.real(log_p) <= np.real(log_q):
                total = total + _term(log_q, log_p, np.longdouble(alpha), np.longdouble(beta))
            else:
                total = total + _term(log_p, log_q, np.longdouble(beta), np.longdouble(alpha))
        values.append(total)
    return values


def _term(log_more, log_less, a, b):
    """-[more^a less^b - a/(a+b) more^(a+b) - b/(a+b) less^(a+b)] / (a b), from more^(a+b) and log(less / more)."""
    if is_left_out(log_less):
        return np.exp((a + b) * log_more) / (b * (a + b)) if b > 0 and a + b > 0 else np.inf
    r = log_less - log_more
    if (abs(a) + abs(b)) * abs(np.real(r)) < 0.3:
        return np.exp((a + b) * log_more) * _series(r, a, b)
    if abs(a) >= abs(a + b):
        return np.exp((a + b) * log_more) * (_growth(a + b, r) - _growth(b, r)) / a
    return np.exp((a + b) * log_more) * (np.exp(b * r) * _growth(a, r) - _growth(b, r)) / (a + b)


def _growth(c, r):
    """(e^(c r) - 1) / c, or its limit."""
    return expm1(c * r) / c if c else r


def _series(r, a, b):
    """The same divided by more^(a+b), as a power series in r whose coefficients are sums of (a+b)^i b^j."""
    total, power, coefficient = 0.0, r * r / 2, np.longdouble(1)
    for n in range(2, 20):
        if coefficient == 0 and a == 0:  # all later coefficients are 0 too
            break
        total = total + power * coefficient
        power = power * r / (n + 1)
        coefficient = (a + b) * coefficient + b ** (n - 1)
    return total


ROWS = (
    Loss(
        formula=alpha_beta_loss,
        inputs={"student_logits": "logits", "teacher_logits": "logits"},
        learns=("student_logits",),
        constant=("teacher_logits",),
        options=(
            {},
            {"alpha": 0.2, "beta": 0.7},
            {"alpha": 1.0, "beta": 0.0},
            {"alpha": 0.0, "beta": 1.0},
            {"alpha": 0.0, "beta": 0.0},
            {"alpha": 0.5, "beta": -0.5},
            {"alpha": 1e-4, "beta": 1e-4},
            {"alpha": -0.3, "beta": 1.2},
        ),
        forms={"alpha": (0.0, 1e-4, 0.2, 0.5, 1.0), "beta": (0.0, 1e-4, 0.5, 0.7, 1.0)},
        shift_invariant=True,
        divergence=True,
        padding=True,
        memory=Memory(jax=12, torch=20),
        benchmarks=(
            Benchmark("128×1000", Sizes((128,), 1000), torch=1.1, jax=1.5, memory=1.0),
            Benchmark("2×512×32,000", Sizes((2, 512), 32_000), torch=1.1, jax=1.5, memory=0.7),
        ),
    ),
)
