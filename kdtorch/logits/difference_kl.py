"""KL divergence between the differences of samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdtorch._collectives import all_gather, all_gather_constant, as_slice, check_batch, local_rows
from kdtorch._numerics import check_classes, custom_op, kl_and_gradient, positive, promote, with_backward
from kdtorch._reduce import count, reduce, zero_masked
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
    about 60 T in float32 (660 T in float64) once the column means, which cancel, are taken out. Wider rows of float32
    go through float64, up to 680 T; beyond, the differences are formed a row at a time. Where student and teacher are
    near, the products are of exp(d) - 1, so that a small loss keeps its digits.

    >>> import torch
    >>> from kdtorch import difference_kl_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> print(f"{difference_kl_loss(s, t):.4f}")
    0.0204
    """
    student, teacher = zero_masked(where, *promote(student_logits, teacher_logits))
    check_classes(student)
    temperature = positive("temperature", temperature, student)
    check_batch(student, group)
    local = local_rows(len(student), group)
    student, teacher = all_gather(student, group), all_gather_constant(teacher, group)
    kept = None if where is None else all_gather_constant(where, group)
    x, y = _center(student, kept), _center(teacher, kept)
    partners = local.to(x.device)[:, None] != torch.arange(len(x), device=x.device)
    partners = partners if kept is None else partners & kept
    pairs = torch.where(partners, _divergences(x, y, local, temperature), 0)
    number = max(len(x), 1) if kept is None else count(kept, x.dtype)
    return reduce(temperature**2 * pairs.sum(1) / number, where, reduction, group)


def _center(x: Tensor, kept: Tensor | None) -> Tensor:
    """Without the column means over kept rows, which no difference feels; masked rows are 0."""
    if kept is not None:
        x = torch.where(kept[:, None], x, 0)
    absent = torch.isneginf(x).to(x.dtype).sum(0)
    number = (len(x) if kept is None else kept.sum(dtype=x.dtype)) - absent
    mean = (_finite(x.detach(), 0.0) / number.clamp(min=1)).sum(0)
    return x - mean if kept is None else torch.where(kept[:, None], x - mean, 0)


def _finite(x: Tensor, absent: float) -> Tensor:
    """x with another number for -inf; a tenth of the time of `torch.where` on a CPU."""
    return x.nan_to_num(nan=math.nan, posinf=math.inf, neginf=absent)


@custom_op(
    "(Tensor x, Tensor y, Tensor local, Tensor temperature) -> (Tensor, Tensor, Tensor)",
    lambda x, y, local, _: tuple(
        x.new_empty(*local.shape, x.shape[0], dtype=t) for t in (x.dtype, _widest(x), _widest(x))
    ),
)
def _forward(x: Tensor, y: Tensor, local: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL of the pairs of this rank's rows and all, `[batch, whole batch]`; from products, the normalisers too."""
    rows, dtype = as_slice(local), _dtype_of_products(x, y, temperature)
    if dtype is None:
        divergence = _by_rows(x, y, rows, temperature)
        unused = torch.empty_like(divergence, dtype=_widest(x))
        return divergence, unused, unused.clone()
    divergence, z_x, z_y = _by_products(x.to(dtype), y.to(dtype), rows, temperature)
    return divergence.to(x.dtype), z_x.to(_widest(x)), z_y.to(_widest(x))


@custom_op(
    "(Tensor cotangent, Tensor value, Tensor z_x, Tensor z_y, Tensor x, Tensor y, Tensor local, Tensor temperature)"
    " -> Tensor",
    lambda cotangent, value, z_x, z_y, x, *_: torch.empty_like(x),
)
def _backward(
    cotangent: Tensor, value: Tensor, z_x: Tensor, z_y: Tensor, x: Tensor, y: Tensor, local: Tensor, temperature: Tensor
) -> Tensor:
    """sum_j [c_ij (p_ij - q_ij) - c_ji (p_ji - q_ji)] / T, p and q the softmaxes of the pair's differences by T."""
    rows, dtype = as_slice(local), _dtype_of_products(x, y, temperature)
    if dtype is None:
        return _pulled_rows(cotangent, x, y, rows, temperature)
    of_student, of_teacher = (
        _pulled_products((cotangent / (temperature * z)).to(dtype), a.to(dtype), rows, temperature)
        for z, a in ((z_x, x), (z_y, y))
    )
    return (of_student - of_teacher).to(x.dtype)


_divergences = with_backward(_forward, _backward)


def _widest(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type == "mps" else torch.float64


def _dtype_of_products(x: Tensor, y: Tensor, temperature: Tensor) -> torch.dtype | None:
    """The first in which exponentials of a row's entries keep their digits; None if they do in none.

    The largest term of a normaliser is at least exp(-span); those below the smallest number, exp(10) of them, must not
    be felt beside it.
    """
    if torch.isneginf(x.amin(-1)).any() and (torch.isneginf(x) & ~torch.isneginf(y)).any():
        return None
    span, digits = torch.maximum(_span(x), _span(y)) / temperature, math.log(torch.finfo(x.dtype).eps)
    reach = {dtype: digits - math.log(torch.finfo(dtype).tiny) - 10 for dtype in (x.dtype, _widest(x))}
    return next((dtype for dtype, limit in reach.items() if (span < limit).all()), None)


def _span(x: Tensor) -> Tensor:
    return x.amax(-1) - _finite(x, math.inf).amin(-1)


def _by_products(x: Tensor, y: Tensor, rows: slice, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL and normalisers of all pairs from products of matrices: Z_ij is one of exponentials of the two rows.

    KL_ij = m - log Z^t_ij + log Z^s_ij with m = E_q[d_i - d_j], d = (y - x) / T. Where student and teacher are near, so
    that these terms would cancel, it comes from small ones: log(1 + s - m) + m with s = E_q[exp(d_j - d_i) - 1 + d_i - d_j],
    and exp(d_j - d_i) - 1 = u_i + v_j + u_i v_j of u = exp(-d) - 1, v = exp(d) - 1.
    """
    e_x, f_x, offset_x = _exponentials(x, rows, temperature)
    e, f, offset = _exponentials(y, rows, temperature)
    z_x, z = e_x @ f_x.T, e @ f.T
    d = _ahead(x, y, temperature)
    level = d - d.mean(-1, keepdim=True)  # which no softmax feels
    near = bool((level.abs().amax(-1) < 4).all())
    d = level if near else d
    mean = ((e * d[rows]) @ f.T - e @ (f * d).T) / z
    if near:
        u, v = (-d).expm1(), d.expm1()
        square = ((e * (u + d)[rows]) @ f.T + e @ (f * (v - d)).T + (e * u[rows]) @ (f * v).T) / z
        divergence = square + ((square - mean).log1p() - (square - mean))
    else:
        divergence = mean + (z_x.log() - z.log()) + (offset_x - offset)
    return divergence.clamp_(min=0), z_x, z


def _ahead(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    """(y - x) / T; 0 where y is -inf."""
    return ((y - x) / temperature).nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0)


def _pulled_products(weight: Tensor, x: Tensor, rows: slice, temperature: Tensor) -> Tensor:
    """sum_j c_ij p_ij - c_ji p_ji, where p_ijk = e_ik f_jk / z_ij and the weight is c / z."""
    e, f, _ = _exponentials(x, rows, temperature)
    result = (weight.T @ e).mul_(f).neg_()
    result[rows] += (weight @ f).mul_(e)
    return result


def _exponentials(x: Tensor, rows: slice, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp((x - max)/T) of some rows, exp((min - x)/T) of all, and (max_i - min_j)/T; a class at -inf is 0 in both."""
    largest, above = x[rows].amax(-1, keepdim=True), _finite(x, math.inf)
    smallest = above.amin(-1, keepdim=True)
    scale = math.log2(math.e) / temperature
    rise, fall = ((x[rows] - largest) * scale).exp2_(), ((smallest - above) * scale).exp2_()
    return rise, fall, (largest - smallest.T) / temperature


def _by_rows(x: Tensor, y: Tensor, rows: slice, temperature: Tensor) -> Tensor:
    """KL of all pairs from the differences themselves, a row at a time."""
    student, teacher = _differences(x), _differences(y)
    return torch.stack([kl_and_gradient(student(i), teacher(i), temperature)[0] for i in range(rows.start, rows.stop)])


def _pulled_rows(cotangent: Tensor, x: Tensor, y: Tensor, rows: slice, temperature: Tensor) -> Tensor:
    student, teacher, result = _differences(x), _differences(y), torch.zeros_like(x)
    for i, c in zip(range(rows.start, rows.stop), cotangent, strict=True):
        gradient = kl_and_gradient(student(i), teacher(i), temperature)[1].mul_(c[:, None])
        result[i] += gradient.sum(0)
        result -= gradient
    return result


def _differences(x: Tensor) -> Callable[[int], Tensor]:
    """x_i - x_j for all j, by i; -inf where one of them is."""
    present = _finite(x, 0.0)
    absent = x - present
    return lambda i: (x[i] - present).add_(absent)
