from typing import Any

import numpy as np

from parity.losses._plain import constant, jsd, kl, over
from parity.row import Loss, Memory


def _logits(hidden, weight, bias):
    bias = np.zeros(len(weight)) if bias is None else bias
    return [
        [sum(a * b for a, b in zip(h, w, strict=True)) + c for w, c in zip(weight, bias, strict=True)] for h in hidden
    ]


def _both(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias):
    teacher = (constant(x) for x in (teacher_hidden, teacher_weight))
    teacher_bias = None if teacher_bias is None else constant(teacher_bias)
    return zip(_logits(student_hidden, student_weight, student_bias), _logits(*teacher, teacher_bias), strict=True)


def linear_kl_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    student_bias=None,
    teacher_bias=None,
    temperature=1.0,
):
    both = _both(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    return [temperature**2 * kl(over(t, temperature), over(s, temperature)) for s, t in both]


def linear_jsd_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    student_bias=None,
    teacher_bias=None,
    beta=0.5,
    temperature=1.0,
):
    both = _both(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    return [jsd(over(t, temperature), over(s, temperature), beta) for s, t in both]


def _rounding(given):
    """A logit is a sum of products, known to that many ULP; a gradient is one of them times a weight or a hidden state."""
    hidden, heads = (
        max(float(np.abs(x[np.isfinite(x)]).max(initial=0)) for k, x in given.inputs.items() if k.endswith(name))
        for name in ("_hidden", "_weight")
    )
    width = max(x.shape[-1] for k, x in given.inputs.items() if k.endswith("_hidden"))
    t = given.options.get("temperature", 1.0)
    logits = 1 + t + width * hidden * heads
    return logits * max(1.0, t), logits * (1 + max(hidden, heads))


_COMMON: Any = {
    "inputs": {
        "student_hidden": "hidden",
        "student_weight": "head",
        "teacher_hidden": "wide_hidden",
        "teacher_weight": "wide_head",
        "student_bias": "bias",
        "teacher_bias": "bias",
    },
    "learns": ("student_hidden", "student_weight", "student_bias"),
    "constant": ("teacher_hidden", "teacher_weight", "teacher_bias"),
    "ranges": {"temperature": (0.5, 20.0)},
    "second_derivative": False,
    "scale": 1.0,  # a divergence of what rounding has made of the logits
    "rounding": _rounding,
    "depends_on_threads": True,  # products of matrices
    "memory": Memory(jax=12, torch=9, largest=lambda n: n.batch[0] * n.classes),
}

ROWS = (
    Loss(formula=linear_kl_loss, options=({}, {"temperature": 4.0}), **_COMMON),
    Loss(
        formula=linear_jsd_loss,
        options=({}, {"beta": 0.1, "temperature": 2.0}, {"beta": 0.0}, {"beta": 1.0}),
        forms={"beta": (0.0, 0.1, 0.5, 1.0)},
        **_COMMON,
    ),
)
