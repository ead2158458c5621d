import numpy as np

from parity.losses._plain import constant, jsd, kl, over
from parity.row import Loss, Memory


def _logits(hidden, weight):
    return [[sum(a * b for a, b in zip(h, w, strict=True)) for w in weight] for h in hidden]


def linear_kl_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, temperature=1.0):
    students, teachers = (
        _logits(student_hidden, student_weight),
        _logits(constant(teacher_hidden), constant(teacher_weight)),
    )
    return [
        temperature**2 * kl(over(t, temperature), over(s, temperature)) for s, t in zip(students, teachers, strict=True)
    ]


def linear_jsd_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, beta=0.5, temperature=1.0):
    students, teachers = (
        _logits(student_hidden, student_weight),
        _logits(constant(teacher_hidden), constant(teacher_weight)),
    )
    return [jsd(over(t, temperature), over(s, temperature), beta) for s, t in zip(students, teachers, strict=True)]


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


_INPUTS = {
    "student_hidden": "features",
    "student_weight": "head",
    "teacher_hidden": "wide_features",
    "teacher_weight": "wide_head",
}
_COMMON = dict(
    inputs=_INPUTS,
    learns=("student_hidden", "student_weight"),
    constant=("teacher_hidden", "teacher_weight"),
    ranges={"temperature": (0.5, 20.0)},
    second_derivative=False,
    rounding=_rounding,
)
_MEMORY = Memory(
    jax=6, torch=8, sizes={"classes": 700, "dim": 64, "teacher_dim": 64}, largest=lambda n: n.batch[0] * n.classes
)

ROWS = (
    Loss(
        formula=linear_kl_loss,
        options=({}, {"temperature": 4.0}),
        scale=1.0,
        memory=_MEMORY,
        **_COMMON,
    ),
    Loss(
        formula=linear_jsd_loss,
        options=({}, {"beta": 0.1, "temperature": 2.0}, {"beta": 0.0}, {"beta": 1.0}),
        forms={"beta": (0.0, 0.1, 0.5, 1.0)},
        scale=1.0,
        memory=_MEMORY,
        **_COMMON,
    ),
)
