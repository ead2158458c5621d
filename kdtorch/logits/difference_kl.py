"""KL divergence between the differences of samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtorch._collectives import as_slice, check_batch, gather, own, replicate
from kdtorch._numerics import check_classes, kl_and_gradient, opaque, positive, pulled_back, widen
from kdtorch._reduce import count, keep, reduce
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked


@checked
def difference_kl_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: Scalar = 1.0,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Difference KL: how one sample's logits differ from another's is drawn to how the teacher's do.

    $$\frac{T^2}{B}\sum_j\mathrm{KL}\big(\mathrm{softmax}((t_i-t_j)/T)\,\|\,\mathrm{softmax}((s_i-s_j)/T)\big)$$

    for sample i, over every sample j of the batch, i among them.

    Args:
        student_logits: `[batch, classes]`.
        teacher_logits: the same shape; constant, its gradient is 0.
        temperature: T > 0.
        where: `[batch]`, False for examples that count for nothing, neither as i nor as j.
        reduction: `"mean"` over kept examples, `"sum"`, or `"none"` for `[batch]`, the mean over partners of each.
        group: the process group that the batch is spread over; the mean over ranks of what they return, and of their
            gradients, is then that of the whole batch.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. A class at -inf in one of two rows is left out of that pair;
        the loss is inf where the student leaves out a class that the teacher uses.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's DIFFKLD, whose released code builds every difference, an array of `[batch², classes]`.
    Here the normalisers of all pairs are matrix products, in `[batch, batch]`, as long as no row spans more than
    about 60 in float32 (500 in float64) once the column means, which cancel, are taken out; beyond, the differences
    are formed a row at a time. Where student and teacher are near, the products are of exp(d) - 1, so that a small
    loss keeps its digits.

    >>> import torch
    >>> from kdtorch import difference_kl_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> print(f"{difference_kl_loss(s, t):.4f}")
    0.0204
    """
    student, teacher = keep(where, *widen(student_logits, teacher_logits))
    check_classes(student)
    temperature = positive("temperature", temperature, student)
    check_batch(student, group)
    mine = own(len(student), group)
    student, teacher = gather(student, group), replicate(teacher, group)
    kept = torch.ones_like(student[:, 0], dtype=torch.bool) if where is None else replicate(where, group)
    x, y = _center(student, kept), _center(teacher, kept)
    place = torch.arange(len(x), device=x.device)
    partners = kept & (mine.to(x.device)[:, None] != place)
    pairs = torch.where(partners, _divergences(x, y, mine, temperature), 0)
    return reduce(temperature**2 * pairs.sum(1) / count(kept, x.dtype), where, reduction, group)


def _center(x: Tensor, kept: Tensor) -> Tensor:
    """Without the column means over kept rows, which no difference feels; masked rows are 0."""
    finite = torch.where(torch.isneginf(x), 0, x)
    number = (kept[:, None] & ~torch.isneginf(x)).sum(0, dtype=x.dtype).clamp(min=1)
    return torch.where(kept[:, None], x - (finite / number).sum(0).detach(), 0)


@opaque(
    "(Tensor x, Tensor y, Tensor mine, Tensor temperature) -> Tensor",
    lambda x, y, mine, _: x.new_empty(len(mine), len(x)),
)
def _forward(x: Tensor, y: Tensor, mine: Tensor, temperature: Tensor) -> Tensor:
    """KL of the pairs of this rank's rows and all, `[batch, whole batch]`."""
    if _narrow(x, y, temperature):
        near = bool((_levelled(_ahead(x, y, temperature)).abs() < 4).all())
        return (_by_expansion if near else _by_products)(x, y, as_slice(mine), temperature)
    return _by_rows(x, y, as_slice(mine), temperature)


@opaque(
    "(Tensor cotangent, Tensor value, Tensor x, Tensor y, Tensor mine, Tensor temperature) -> Tensor",
    lambda cotangent, value, x, *_: torch.empty_like(x),
)
def _backward(cotangent: Tensor, value: Tensor, x: Tensor, y: Tensor, mine: Tensor, temperature: Tensor) -> Tensor:
    """sum_j [c_ij (p_ij - q_ij) - c_ji (p_ji - q_ji)] / T, p and q the softmaxes of the pair's differences by T."""
    rows = as_slice(mine)
    if _narrow(x, y, temperature):
        cotangent = cotangent / temperature
        return _pulled_products(cotangent, x, rows, temperature) - _pulled_products(cotangent, y, rows, temperature)
    result = torch.zeros_like(x)
    for i, (a, b) in enumerate(zip(x[rows], y[rows], strict=True)):
        _, gradient = kl_and_gradient(_differences(a, x), _differences(b, y), temperature)
        gradient *= cotangent[i, :, None]
        result[rows][i] += gradient.sum(0)
        result -= gradient
    return result


_divergences = pulled_back(_forward, _backward)


def _narrow(x: Tensor, y: Tensor, temperature: Tensor) -> bool:
    limit = -0.7 * math.log(torch.finfo(x.dtype).tiny) * temperature
    left_out = torch.isneginf(x) & ~torch.isneginf(y)
    return bool((_span(x) < limit).all() & (_span(y) < limit).all() & ~left_out.any())


def _span(x: Tensor) -> Tensor:
    return x.amax(-1) - torch.where(torch.isneginf(x), x.amax(-1, keepdim=True), x).amin(-1)


def _by_products(x: Tensor, y: Tensor, rows: slice, temperature: Tensor) -> Tensor:
    """KL of all pairs from products of matrices: log Z_ij is a product of exponentials of the two rows.

    KL_ij = sum_k q_ijk (d_ik - d_jk) - log Z^t_ij + log Z^s_ij with d = (y - x) / T.
    """
    e_x, f_x, offset_x = _exponentials(x, rows, temperature)
    e_y, f_y, offset_y = _exponentials(y, rows, temperature)
    z_x, z_y = e_x @ f_x.T, e_y @ f_y.T
    d = _ahead(x, y, temperature)
    mean = ((e_y * d[rows]) @ f_y.T - e_y @ (f_y * d).T) / z_y
    divergence = mean + (z_x.log() - z_y.log()) + (offset_x - offset_y)
    return divergence.clamp(min=0)


def _by_expansion(x: Tensor, y: Tensor, rows: slice, temperature: Tensor) -> Tensor:
    """The same where student and teacher are near, so that its terms would cancel: small ones from the start.

    KL_ij = log(1 + s - m) + m with m = E_q[d_i - d_j], s = E_q[exp(d_j - d_i) - 1 + d_i - d_j], d = (y - x) / T, and
    exp(d_j - d_i) - 1 = u_i + v_j + u_i v_j of u = exp(-d) - 1, v = exp(d) - 1.
    """
    e, f, _ = _exponentials(y, rows, temperature)
    d = _levelled(_ahead(x, y, temperature))
    u, v = (-d).expm1(), d.expm1()
    z = e @ f.T
    mean = ((e * d[rows]) @ f.T - e @ (f * d).T) / z
    square = ((e * (u + d)[rows]) @ f.T + e @ (f * (v - d)).T + (e * u[rows]) @ (f * v).T) / z
    divergence = square + ((square - mean).log1p() - (square - mean))
    return divergence.clamp(min=0)


def _ahead(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    """(y - x) / T; 0 where y is -inf."""
    return torch.where(torch.isneginf(y), 0, y - torch.where(torch.isneginf(x), 0, x)) / temperature


def _levelled(d: Tensor) -> Tensor:
    """Without the rows' means, which no softmax feels."""
    return d - d.mean(-1, keepdim=True)


def _pulled_products(cotangent: Tensor, x: Tensor, rows: slice, temperature: Tensor) -> Tensor:
    """sum_j c_ij p_ij - c_ji p_ji, where p_ijk = e_ik f_jk / z_ij."""
    e, f, _ = _exponentials(x, rows, temperature)
    weight = cotangent / (e @ f.T)
    result = -f * (weight.T @ e)
    result[rows] += e * (weight @ f)
    return result


def _exponentials(x: Tensor, rows: slice, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp((x - max)/T) of some rows, exp((min - x)/T) of all, and (max_i - min_j)/T; a class at -inf is 0 in both."""
    left_out = torch.isneginf(x)
    largest = x.amax(-1, keepdim=True)
    smallest = torch.where(left_out, largest, x).amin(-1, keepdim=True)
    fall = torch.where(left_out, 0, ((smallest - torch.where(left_out, smallest, x)) / temperature).exp())
    rise = ((x[rows] - largest[rows]) / temperature).exp()
    return rise, fall, (largest[rows] - smallest.T) / temperature


def _by_rows(x: Tensor, y: Tensor, rows: slice, temperature: Tensor) -> Tensor:
    """KL of all pairs from the differences themselves, a row at a time."""

    def row(a: Tensor, b: Tensor) -> Tensor:
        return kl_and_gradient(_differences(a, x), _differences(b, y), temperature)[0]

    return torch.stack(list(map(row, x[rows], y[rows])))


def _differences(row: Tensor, rows: Tensor) -> Tensor:
    return torch.where(torch.isneginf(row) | torch.isneginf(rows), -math.inf, row - rows)
