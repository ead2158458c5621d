from typing import Any

import numpy as np

from parity.losses import reverse_kl, topk_kl
from parity.losses._plain import constant, is_left_out, jsd, kl, over
from parity.row import Loss, Memory
from parity.scales import size


def _capped(x, cap):
    """cap tanh(x / cap); -inf stays -inf. The derivative is 1 / cosh², because a small 1 - tanh² has few digits."""
    if cap is None or is_left_out(x):
        return x
    real = np.clip(np.real(x) / cap, -5000, 5000)  # beyond that, cosh² overflows in extended precision
    value = np.tanh(real)
    return cap * (value + 1j * np.imag(x) / cap / np.cosh(real) ** 2) if np.iscomplexobj(x) else cap * value


def _logits(hidden, weight, bias, scale, cap):
    bias = np.zeros(len(weight)) if bias is None else bias
    return [
        [
            _capped(scale * (sum(a * b for a, b in zip(h, w, strict=True)) + c), cap)
            for w, c in zip(weight, bias, strict=True)
        ]
        for h in hidden
    ]


def _both(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias, scales, cap):
    teacher = (constant(x) for x in (teacher_hidden, teacher_weight))
    teacher_bias = None if teacher_bias is None else constant(teacher_bias)
    student_logits = _logits(student_hidden, student_weight, student_bias, scales[0], cap)
    return list(zip(student_logits, _logits(*teacher, teacher_bias, scales[1], cap), strict=True))


def linear_kl_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    student_bias=None,
    teacher_bias=None,
    temperature=1.0,
    student_scale=1.0,
    teacher_scale=1.0,
    softcap=None,
    memory="low",
):
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias
    both = _both(*heads, (student_scale, teacher_scale), softcap)
    return [temperature**2 * kl(over(t, temperature), over(s, temperature)) for s, t in both]


def linear_reverse_kl_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    student_bias=None,
    teacher_bias=None,
    temperature=1.0,
    student_scale=1.0,
    teacher_scale=1.0,
    softcap=None,
    memory="low",
):
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias
    both = _both(*heads, (student_scale, teacher_scale), softcap)
    return reverse_kl.reverse_kl_loss([s for s, _ in both], [t for _, t in both], temperature)


def linear_jsd_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    student_bias=None,
    teacher_bias=None,
    beta=0.5,
    temperature=1.0,
    student_scale=1.0,
    teacher_scale=1.0,
    softcap=None,
    memory="low",
):
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias
    both = _both(*heads, (student_scale, teacher_scale), softcap)
    return [jsd(over(t, temperature), over(s, temperature), beta) for s, t in both]


def linear_topk_kl_loss(
    student_hidden,
    student_weight,
    values,
    indices,
    rest,
    student_bias=None,
    temperature=1.0,
    tail="bucket",
    divergence="kl",
    beta=0.5,
    student_scale=1.0,
    softcap=None,
    memory="low",
):
    logits = _logits(student_hidden, student_weight, student_bias, student_scale, softcap)
    return topk_kl.topk_kl_loss(logits, values, indices, rest, temperature, tail, divergence, beta)


def _rounding(given):
    """A logit is a sum of products, each with its own rounding; a gradient is one times a weight or a hidden state."""
    hidden, heads, known = (
        max((size(x) for k, x in given.inputs.items() if k.endswith(names)), default=0.0)
        for names in ("_hidden", "_weight", ("values", "rest"))
    )
    width = max(x.shape[-1] for k, x in given.inputs.items() if k.endswith("_hidden"))
    t, scale = given.options.get("temperature", 1.0), max(1.0, given.options.get("student_scale", 1.0))
    logits = 1 + t + max(scale, given.options.get("teacher_scale", 1.0)) * width * hidden * heads + known
    return logits * max(1.0, t), logits * (1 + max(hidden, heads)) * scale


_COMMON: Any = {
    "learns": ("student_hidden", "student_weight", "student_bias"),
    "second_derivative": False,
    "scale": 1.0,  # a divergence of logits that rounding has changed
    "rounding": _rounding,
    "depends_on_threads": True,  # because of matrix products
}
_HEADS: Any = {
    "inputs": {
        "student_hidden": "hidden",
        "student_weight": "head",
        "teacher_hidden": "wide_hidden",
        "teacher_weight": "wide_head",
        "student_bias": "bias",
        "teacher_bias": "bias",
    },
    "constant": ("teacher_hidden", "teacher_weight", "teacher_bias"),
    "ranges": {"temperature": (0.5, 20.0), "student_scale": (0.25, 2.0), "teacher_scale": (0.25, 2.0)},
    "memory": Memory(jax=12, torch=9, largest=lambda n: n.batch[0] * n.classes),
    **_COMMON,
}
_SCALED = {"temperature": 2.0, "student_scale": 0.5, "teacher_scale": 1.5, "softcap": 3.0}

ROWS = (
    Loss(
        formula=linear_kl_loss,
        options=({}, {"temperature": 4.0}, _SCALED, {**_SCALED, "memory": "least"}),
        forms={"memory": ("low", "least")},
        **_HEADS,
    ),
    Loss(
        formula=linear_reverse_kl_loss,
        options=({}, _SCALED, {"temperature": 4.0, "memory": "least"}),
        forms={"memory": ("low", "least")},
        **_HEADS,
    ),
    Loss(
        formula=linear_jsd_loss,
        options=({}, {"beta": 0.1, "temperature": 2.0}, {"beta": 0.0}, {"beta": 1.0}, {**_SCALED, "memory": "least"}),
        forms={"beta": (0.0, 0.1, 0.5, 1.0), "memory": ("least", "least", "low", "least")},
        **_HEADS,
    ),
    Loss(
        formula=linear_topk_kl_loss,
        inputs={
            "student_hidden": "hidden",
            "student_weight": "head",
            "values": "kept_logits",
            "indices": "kept_classes",
            "rest": "rest",
            "student_bias": "bias",
        },
        constant=("values", "rest"),
        options=(
            {},
            {"temperature": 2.0, "student_scale": 0.5, "softcap": 3.0},
            {"temperature": 2.0, "divergence": "jsd", "beta": 0.1, "memory": "least"},
            {"divergence": "reverse_kl", "tail": "renormalize", "memory": "least"},
        ),
        ranges={"temperature": (0.5, 20.0), "student_scale": (0.25, 2.0)},
        forms={
            "divergence": ("reverse_kl", "jsd", "kl", "kl"),
            "beta": (0.5, 0.1, 0.5, 0.5),
            "memory": ("least", "low", "least", "low"),
        },
        memory=Memory(jax=12, torch=9, largest=lambda n: n.batch[0] * n.classes),
        **_COMMON,
    ),
)
