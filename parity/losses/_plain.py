"""Shared by the oracles: elementary functions of plain lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def constant(x: Any) -> Any:
    """x without its derivative."""
    return np.real(x)


def is_left_out(logit: Any) -> bool:
    return np.isneginf(np.real(logit))


def over(logits: Iterable[Any], temperature: Any) -> list[Any]:
    return [x if is_left_out(x) else x / temperature for x in logits]


def log1p(x: Any) -> Any:
    """log(1 + x). NumPy's function loses a small real part of a complex number."""
    return np.log1p(np.real(x)) + 1j * np.imag(x) / (1 + np.real(x)) if np.iscomplexobj(x) else np.log1p(x)


def expm1(x: Any) -> Any:
    """e^x - 1, which also keeps a small real part."""
    return np.expm1(np.real(x)) + 1j * np.imag(x) * np.exp(np.real(x)) if np.iscomplexobj(x) else np.expm1(x)


def log_softmax(logits: Sequence[Any]) -> list[Any]:
    """log softmax. A class at -inf stays there and contributes nothing; derivatives of small classes are not lost."""
    first = int(np.argmax([np.real(x) for x in logits]))
    largest = logits[first]
    if is_left_out(largest):
        return list(logits)
    others = sum(np.exp(x - largest) for x in without(logits, [first]) if not is_left_out(x))
    return [-np.inf if is_left_out(x) else x - largest - log1p(others) for x in logits]


def softmax(logits: Sequence[Any]) -> list[Any]:
    return [0.0 if is_left_out(x) else np.exp(x) for x in log_softmax(logits)]


def kl(teacher_logits: Sequence[Any], student_logits: Sequence[Any]) -> Any:
    """KL(softmax(teacher) || softmax(student))."""
    total = 0.0
    for log_q, log_p in zip(log_softmax(teacher_logits), log_softmax(student_logits), strict=True):
        q = 0.0 if is_left_out(log_q) else np.exp(log_q)
        if np.real(q) > 0:
            total = total + q * (log_q - log_p)
    return total


def jsd(teacher_logits: Sequence[Any], student_logits: Sequence[Any], beta: Any) -> Any:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; KL(q || p) at beta 0, KL(p || q) at 1."""
    if beta in (0, 1):
        return kl(student_logits, teacher_logits) if beta else kl(teacher_logits, student_logits)
    log_q, log_p, share = log_softmax(teacher_logits), log_softmax(student_logits), np.longdouble(beta)
    return share * _to_mixture(log_q, log_p, 1 - share) + (1 - share) * _to_mixture(log_p, log_q, share)


def _to_mixture(log_p: Sequence[Any], log_q: Sequence[Any], share: Any) -> Any:
    """KL(p || share q + (1 - share) p)."""
    total = 0.0
    for a, b in zip(log_p, log_q, strict=True):
        if is_left_out(a) or np.real(np.exp(a)) == 0:
            continue
        parts = [np.log(1 - share) + a, *([] if is_left_out(b) else [np.log(share) + b])]
        largest = max(np.real(x) for x in parts)
        total = total + np.exp(a) * (a - largest - np.log(sum(np.exp(x - largest) for x in parts)))
    return total


def without(values: Iterable[Any], places: Iterable[int]) -> list[Any]:
    left_out = set(places)
    return [x for k, x in enumerate(values) if k not in left_out]


def norm(x: Any) -> Any:
    """The Euclidean norm; its derivative at 0 is 0."""
    square = sum(v * v for v in x)
    return np.sqrt(square) if np.real(square) > 0 else 0.0 * square


def unit(x: Any) -> Any:
    """x / |x|, or x if x is 0."""
    length = norm(x)
    return np.array([v / length for v in x]) if np.real(length) > 0 else np.array(constant(x))


def signed(x: Any, number: Any) -> Any:
    """A number with the sign of x; 0 where x is 0."""
    return np.sign(np.real(x)) * number


def magnitude(x: Any) -> Any:
    """|x|, with derivative 0 at 0."""
    return signed(x, x)


def pooled_alike(one: Any, other: Any) -> tuple[Any, Any]:
    """Two maps [channels, height, width], each averaged to the smaller height and to the smaller width."""
    rows, columns = min(one.shape[1], other.shape[1]), min(one.shape[2], other.shape[2])
    return _pooled(one, rows, columns), _pooled(other, rows, columns)


def _pooled(x: Any, rows: int, columns: int) -> Any:
    channels, height, width = x.shape
    result = np.zeros((channels, rows, columns), x.dtype)
    for r in range(rows):
        for q in range(columns):
            window = x[
                :,
                r * height // rows : -(-(r + 1) * height // rows),
                q * width // columns : -(-(q + 1) * width // columns),
            ]
            result[:, r, q] = window.sum((1, 2)) / (window.shape[1] * window.shape[2])
    return result
