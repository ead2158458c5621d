"""KL divergence between the differences of samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdtorch._collectives import all_gather, all_gather_constant, check_batch, local_rows
from kdtorch._numerics import check_classes, coupled, custom_op, kl_and_gradient, positive, promote, scalar
from kdtorch._reduce import check_reduction, count, reduce, reduce_sum, zero_masked
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
    r"""Difference KL: the differences between the logits of two examples should match the teacher's.

    $$\frac{T^2}{B}\sum_j\mathrm{KL}\big(\mathrm{softmax}((t_i-t_j)/T)\,\|\,\mathrm{softmax}((s_i-s_j)/T)\big)$$

    for example i, over every example j of the batch, i included.

    Args:
        student_logits: `[batch, classes]`.
        teacher_logits: the same shape; constant.
        temperature: T > 0; a tensor has a gradient.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. A class at -inf in one of two rows is left out of that pair;
        the loss is inf where the student leaves out a class that the teacher uses, and NaN for a row that is -inf
        throughout and for pairs without a class in common, which are no distributions.

    Raises:
        ValueError: a temperature that is not positive, fewer than 2 classes, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's DIFFKLD, whose released code builds every difference, a tensor `[batch², classes]`. This
    function computes the normalisers of all pairs by matrix products, `[batch, batch]`, unless the logits of an example
    span too wide a range. It subtracts the column means first, which cancel. The limit is about 60 T in float32 and 660
    T in float64; float32 logits of up to 680 T are computed in float64; beyond it, the differences are formed a row at
    a time. If student and teacher are close, the products are of exp(d) - 1, so a small loss keeps its precision.

    >>> import torch
    >>> from kdtorch import difference_kl_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> print(f"{difference_kl_loss(s, t):.4f}")
    0.0204
    """
    check_classes(student_logits)
    check_reduction(reduction)
    temperature = positive("temperature", temperature, student_logits, teacher_logits)
    temperature = scalar(temperature, student_logits, teacher_logits)
    check_batch(student_logits, group)
    local = local_rows(len(student_logits), group)
    kept = None if where is None else all_gather_constant(where, group)
    if group is not None:  # so that gradients are not summed in half precision
        student_logits, teacher_logits = promote(student_logits, teacher_logits)
    student, teacher = all_gather(student_logits, group), all_gather_constant(teacher_logits, group)
    value = _divergences(student, temperature, teacher, kept, local.start, local.stop, summed=reduction != "none")
    if reduction == "none":
        return reduce(value, where, reduction, group)
    return reduce_sum(value, local.stop - local.start, where, reduction, group)


# An operator whose gradients are written by hand: it chooses between methods by the values, and stores neither an array
# of all pairs nor anything of the teacher until the backward pass.
@custom_op(
    "(Tensor student, Tensor temperature, Tensor teacher, Tensor? kept, SymInt start, SymInt stop, Tensor? weights,"
    " bool of_student, bool of_temperature) -> (Tensor, Tensor, Tensor)",
    lambda student, temperature, teacher, kept, start, stop, weights, of_student, of_temperature: (
        (x := promote(student, teacher)[0]).new_empty(stop - start),
        x.new_empty(x.shape if of_student else 0),
        x.new_empty(()),
    ),
)
def _evaluate(
    student: Tensor,
    temperature: Tensor,
    teacher: Tensor,
    kept: Tensor | None,
    start: int,
    stop: int,
    weights: Tensor | None,
    of_student: bool,
    of_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """T^2 / B sum_j KL_ij for this rank's i, and the gradients of the weighted sum of these values."""
    x, y = (_center(z, kept) for z in promote(student, teacher))
    rows, number = slice(start, stop), max(len(x), 1) if kept is None else count(kept, x.dtype)
    place = torch.arange(len(x), device=x.device)
    partners = place[rows, None] != place
    if kept is not None:
        partners &= kept & kept[rows, None]
    share = partners * (temperature**2 / number)
    if weights is not None:
        share *= weights[:, None]

    dtype = _dtype_of_products(x, y, kept, temperature)
    way = _by_rows if dtype is None else _by_expansion if _are_near(x, y, temperature) else _by_products
    wide = dtype or x.dtype
    divergence, gradient, cooling = way(
        x.to(wide), y.to(wide), temperature.to(wide), rows, share.to(wide) if of_student else None, of_temperature
    )
    divergence, cooling, gradient = (z.to(x.dtype) for z in (divergence, cooling, gradient))
    divergence, cooling = (torch.where(partners, z, 0) for z in (divergence, cooling))
    undefined = _no_common_class(x, y, rows)
    if undefined is not None:
        divergence.masked_fill_(undefined, math.nan)
        touched = undefined.any(0)
        touched[rows] |= undefined.any(1)
        gradient = gradient.masked_fill_(touched[:, None], math.nan) if of_student else gradient
    of_all = (share * (2 * divergence - cooling)).sum() / temperature
    if of_student:
        (gradient,) = zero_masked(kept, gradient)
    return temperature**2 * divergence.sum(1) / number, gradient, of_all


_divergences = coupled(_evaluate, learns=2)


def _center(x: Tensor, kept: Tensor | None) -> Tensor:
    """The rows minus the column means over kept rows, which do not change differences; masked rows are 0."""
    (x,) = zero_masked(kept, x)
    absent = torch.isneginf(x).to(x.dtype).sum(0)
    number = (len(x) if kept is None else kept.sum(dtype=x.dtype)) - absent
    return zero_masked(kept, x - (_finite(x, 0.0) / number.clamp(min=1)).sum(0))[0]


def _finite(x: Tensor, absent: float) -> Tensor:
    """x with -inf replaced by another number, on a CPU in a tenth of the time of `torch.where`."""
    return x.nan_to_num(nan=math.nan, posinf=math.inf, neginf=absent)


def _no_common_class(x: Tensor, y: Tensor, rows: slice) -> Tensor | None:
    """Which pairs of rows (also a row with itself) have no common class above -inf; None if no class is at -inf."""
    if not torch.isneginf(torch.minimum(x.amin(-1), y.amin(-1))).any():
        return None
    present = [(~torch.isneginf(z)).to(z.dtype) for z in (x, y)]
    return torch.stack([z[rows] @ z.T == 0 for z in present]).any(0)


def _dtype_of_products(x: Tensor, y: Tensor, kept: Tensor | None, temperature: Tensor) -> torch.dtype | None:
    """The first dtype in which matrix products of the exponentials of rows are accurate, or None.

    The largest term of a normaliser is at least exp(-span), or exp(-2 span) if rows have different classes at -inf.
    Terms that underflow, up to exp(10) of them, must be negligible compared with it.
    """
    span = torch.maximum(_span(x), _span(y)) / temperature
    if torch.isneginf(torch.minimum(x.amin(-1), y.amin(-1))).any():
        x_absent, y_absent = (torch.isneginf(z if kept is None else z[kept]) for z in (x, y))
        if (x_absent & ~y_absent & ~x_absent.all(-1, keepdim=True)).any():
            return None
        if any((z.any(0) & ~z.all(0)).any() for z in (x_absent, y_absent)):
            span = 2 * span
    digits = math.log(torch.finfo(x.dtype).eps)
    widest = x.dtype if x.device.type == "mps" else torch.float64
    reach = {dtype: digits - math.log(torch.finfo(dtype).tiny) - 10 for dtype in (x.dtype, widest)}
    return next((dtype for dtype, limit in reach.items() if (span < limit).all()), None)


def _span(x: Tensor) -> Tensor:
    return x.amax(-1) - _finite(x, math.inf).amin(-1)


def _are_near(x: Tensor, y: Tensor, temperature: Tensor) -> bool:
    """Whether student and teacher are close; then they also have the same classes at -inf."""
    d = ((y - x) / temperature).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return bool((_levelled(d).abs().amax(-1) < 2).all())


def _by_products(
    x: Tensor, y: Tensor, temperature: Tensor, rows: slice, share: Tensor | None, of_temperature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL of all pairs from matrix products, the gradient of their sum weighted by `share`, and -T ∂KL/∂T of each pair.

    KL_ij = E_q[d_i - d_j] - log Z^t_ij + log Z^s_ij with d = (y - x) / T.
    """
    p = _softmaxes(x, temperature, rows)
    d, a = _ahead(x, y, temperature), _levelled(_finite(x, 0.0) / temperature) if of_temperature else x
    gradient, total, offset = p.pulled(share), p.total, p.offset
    cooling = p.mean(a, -a) if of_temperature else total
    del p
    q = _softmaxes(y, temperature, rows)
    mean = q.mean(d, -d)
    divergence = mean + (total.log() - q.total.log()) + (offset - q.offset)
    if of_temperature:
        b = a + d
        cooling = cooling - q.mean(a, -a) + q.cross(b, d) - q.mean(b, -b) * mean
    return divergence.clamp_(min=0), gradient.sub_(q.pulled(share)).div_(temperature), cooling


def _by_expansion(
    x: Tensor, y: Tensor, temperature: Tensor, rows: slice, share: Tensor | None, of_temperature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for student and teacher that are close, from small terms, because the large ones would cancel.

    KL_ij = log(1 + s - m) + m with m = E_q[D], D = d_i - d_j, s = E_q[S], S = exp(-D) - 1 + D, d = (y - x) / T, and
    exp(-D) - 1 = u_i + v_j + u_i v_j, where u = exp(-d) - 1 and v = exp(d) - 1.
    """
    gradient = _softmaxes(x, temperature, rows).pulled(share)
    q, d = _softmaxes(y, temperature, rows), _levelled(_ahead(x, y, temperature))
    u, v = (-d).expm1(), d.expm1()
    mean, square = q.mean(d, -d), q.mean(u + d, v - d) + q.product(u, v)
    divergence = square + ((square - mean).log1p() - (square - mean))
    cooling = mean
    if of_temperature:
        # p / q - 1 is (S - s - D + m) / (1 + s - m); so p - q and the covariance under q, which nearly cancel, are
        # small
        a = _levelled(_finite(x, 0.0) / temperature)
        middle = q.mean(a, -a)
        joint = q.mean(a * (u + d), a * (d - v)) + q.product(a, v - d) - q.product(u + d, a)
        joint += q.product(a * u, v) - q.product(u, a * v)
        rest = joint - middle * square + (square - mean) * (q.cross(a, d) - middle * mean)
        cooling = q.cross(d, d) - mean.square() + rest / (1 + (square - mean))
    return divergence.clamp_(min=0), gradient.sub_(q.pulled(share)).div_(temperature), cooling


def _ahead(x: Tensor, y: Tensor, temperature: Tensor) -> Tensor:
    """(y - x) / T; 0 where y is -inf."""
    return ((y - x) / temperature).nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0)


def _levelled(d: Tensor) -> Tensor:
    """The array minus the rows' means, which do not affect a softmax."""
    return d - d.mean(-1, keepdim=True)


class _Softmaxes(NamedTuple):
    """softmax((x_i - x_j) / T) of this rank's i and all j, as `rise[i] * fall[j] / total[i, j]`.

    Attributes:
        rise: exp((x - largest) / T) of this rank's rows; 0 for a class at -inf.
        fall: exp((smallest - x) / T) of all rows; 0 for a class at -inf.
        total: `[batch, whole batch]`, the sum over classes of the product.
        offset: (largest_i - smallest_j) / T; added to log(total), it is the logarithm of the normaliser.
        rows: the positions of this rank's rows.
    """

    rise: Tensor
    fall: Tensor
    total: Tensor
    offset: Tensor
    rows: slice

    def mean(self, u: Tensor, v: Tensor) -> Tensor:
        """The mean of u_i + v_j."""
        return ((self.rise * u[self.rows]) @ self.fall.T + self.rise @ (self.fall * v).T) / self.total

    def product(self, u: Tensor, v: Tensor) -> Tensor:
        """The mean of u_i v_j."""
        return (self.rise * u[self.rows]) @ (self.fall * v).T / self.total

    def cross(self, u: Tensor, v: Tensor) -> Tensor:
        """The mean of (u_i - u_j) (v_i - v_j)."""
        return self.mean(u * v, u * v) - self.product(u, v) - self.product(v, u)

    def pulled(self, share: Tensor | None) -> Tensor:
        """sum_j share_ij p_ij - share_ji p_ji, where p are the softmaxes."""
        if share is None:
            return self.total.new_empty(0)
        weight = share / self.total
        result = (weight.T @ self.rise).mul_(self.fall).neg_()
        result[self.rows] += (weight @ self.fall).mul_(self.rise)
        return result


def _softmaxes(x: Tensor, temperature: Tensor, rows: slice) -> _Softmaxes:
    largest, above = x[rows].amax(-1, keepdim=True), _finite(x, math.inf)
    smallest = above.amin(-1, keepdim=True)
    scale = math.log2(math.e) / temperature
    rise, fall = ((x[rows] - largest) * scale).exp2_(), ((smallest - above) * scale).exp2_()
    return _Softmaxes(rise, fall, rise @ fall.T, (largest - smallest.T) / temperature, rows)


def _by_rows(
    x: Tensor, y: Tensor, temperature: Tensor, rows: slice, share: Tensor | None, of_temperature: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the differences themselves, one row at a time."""
    student, teacher = _differences(x), _differences(y)
    divergence = x.new_empty(rows.stop - rows.start, len(x))
    gradient, cooling = x.new_zeros(x.shape if share is not None else 0), torch.zeros_like(divergence)
    for here, i in enumerate(range(rows.start, rows.stop)):
        a, b = student(i), teacher(i)
        divergence[here], pull = kl_and_gradient(a, b, temperature)
        if of_temperature:
            cooling[here] = _cooling(a, b, temperature, pull).masked_fill_(divergence[here].isinf(), 0)
        if share is not None:
            pull.mul_(share[here, :, None])
            gradient[i] += pull.sum(0)
            gradient -= pull
    return divergence, gradient, cooling


def _cooling(a: Tensor, b: Tensor, temperature: Tensor, gradient: Tensor) -> Tensor:
    """-T times the derivative of KL(softmax(b / T) || softmax(a / T)) with respect to T, given the gradient for a."""
    d, q = _ahead(a, b, temperature), (b / temperature).softmax(-1)
    a, b = _finite(a, 0.0), _finite(b, 0.0) / temperature
    centered = q * (d - (q * d).sum(-1, keepdim=True))
    return (centered * (b - (q * b).sum(-1, keepdim=True))).sum(-1) + (
        gradient * (a - (q * a).sum(-1, keepdim=True))
    ).sum(-1)


def _differences(x: Tensor) -> Callable[[int], Tensor]:
    """A function from i to x_i - x_j for all j; -inf where one of the two is."""
    present = _finite(x, 0.0)
    absent = x - present
    return lambda i: (x[i] - present).add_(absent)
