"""Sinkhorn-Knopp: a teacher's outputs as assignments that use all prototypes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kdtorch._collectives import all_max, all_sum
from kdtorch._numerics import BLOCK, check_classes, eager_on_cpu, positive, softmax, widest
from kdtorch._typing import Bool, Float, ProcessGroup, Scalar, checked


@checked(learns=("teacher_logits",))
def sinkhorn_knopp(
    teacher_logits: Float[Tensor, "batch prototypes"],
    *,
    temperature: Scalar,
    iterations: int = 3,
    where: Bool[Tensor, "batch"] | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Sinkhorn-Knopp: the teacher's softmax, balanced over the batch so that all prototypes are used about equally.

    $$Q_{ik}=\frac{r_i\,e^{t_{ik}/T}\,c_k}{\sum_{k'}r_i\,e^{t_{ik'}/T}\,c_{k'}}$$

    where each iteration first chooses c so that the mass Σ_i Q_ik of every prototype is equal, and then r so that that
    of every sample is 1. After the last step the rows sum to 1, and the prototypes are nearly balanced. This is not a
    loss: pass the result to `dino_loss` and `ibot_loss` as `teacher_targets`, instead of centring.

    Args:
        teacher_logits: `[batch, prototypes]`, of a teacher; constant.
        temperature: T > 0, a constant; DINOv2 uses the warm-up of `dino_teacher_temperature`.
        iterations: how often prototypes and samples are normalised, at least 1.
        where: `[batch]`, False for samples that are left out; their assignments are 0.
        group: the process group that the batch is spread over.

    Returns:
        `[batch, prototypes]`, in float32 or float64, without a gradient. A prototype that is -inf in all samples has
        probability 0.

    Raises:
        ValueError: a temperature that is not positive, `iterations` below 1, fewer than 2 prototypes.
        TypeError: a shape or dtype that does not fit.

    Caron et al., *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments* (SwaV), NeurIPS 2020,
    https://arxiv.org/abs/2006.09882. The released codes of SwaV, DINOv2 and DINOv3 take exponentials of t / T, which
    overflow float32 for t ≥ 3.55 at T = 0.04 and then give NaN; this function computes in log space if t / T spans more
    than 60.

    >>> import torch
    >>> from kdtorch import sinkhorn_knopp
    >>> logits = torch.tensor([[2.0, 1.0], [1.0, 0.5]])  # all samples are nearest to the first prototype
    >>> [[round(x, 2) for x in row] for row in sinkhorn_knopp(logits, temperature=0.5).tolist()]
    [[0.62, 0.38], [0.38, 0.62]]
    """
    check_classes(teacher_logits)
    check_iterations(iterations)
    x, dtype = teacher_logits.detach(), widest(teacher_logits)
    temperature = positive("temperature", temperature, x, constant=True)
    quick = _by_products(x, where, temperature, iterations, group)
    if quick is not None:
        return quick
    peak = x.new_full(x.shape[1:], -math.inf, dtype=dtype)
    for _, part in _blocks(x, where):
        peak = torch.maximum(peak, part.amax(0)) if len(part) else peak
    peak = all_max(peak, group).clamp(min=torch.finfo(dtype).min)
    mass = torch.zeros_like(peak)
    for _, part in _blocks(x, where):
        mass = mass + ((part - peak) / temperature).exp().sum(0)
    log_mass = _log(all_sum(mass, group))
    for _ in range(iterations - 1):
        mass = torch.zeros_like(peak)
        for _, part in _blocks(x, where):
            mass = mass + _softmax((part - peak) / temperature - log_mass).sum(0)
        # from the second step on, a column sums to at least 1 / (batch * prototypes), and at most to batch
        log_mass = log_mass + _log(all_sum(mass, group))
    results = []
    for kept, part in _blocks(x, where):
        p = _softmax((part - peak) / temperature - log_mass)
        empty = part.isneginf().all(-1)
        results.append(p.masked_fill_((empty if kept is None else empty & kept).unsqueeze(-1), math.nan))
    return torch.cat(results)


SPAN = 60.0  # if logits / T differ by less, exponentials and their products with sums stay in the range of float32


def _by_products(
    x: Tensor, where: Tensor | None, temperature: Scalar, iterations: int, group: ProcessGroup | None
) -> Tensor | None:
    """The assignments by matrix-vector products, in eager PyTorch on a CPU; None if exponentials leave the range."""
    if group is not None or not eager_on_cpu(x, temperature) or not len(x):
        return None
    if where is not None and not where.any():
        return None
    ends = [part if kept is None else part[kept] for kept, part in _pairs(x, where)]
    least, largest = (torch.stack(z) for z in zip(*(part.aminmax() for part in ends if len(part)), strict=True))
    least, largest = least.amin().to(widest(x)), largest.amax().to(widest(x))
    if not bool(largest.isfinite() & (largest - least < SPAN * temperature)):
        return None
    weight = x.new_empty(x.shape, dtype=widest(x))
    for block, (kept, part) in zip(weight.split(_size(x)), _pairs(x, where), strict=True):
        torch.sub(part.to(block.dtype), largest, out=block).div_(temperature).exp_()
        if kept is not None:
            block.masked_fill_(~kept.unsqueeze(-1), 0)
    rows = weight.new_ones(len(x)) if where is None else where.to(weight.dtype)
    for _ in range(iterations):
        columns = (rows @ weight).reciprocal_()
        rows = (weight @ columns).reciprocal_()
        if where is not None:
            rows.masked_fill_(~where, 0)
    for block, row in zip(weight.split(_size(x)), rows.split(_size(x)), strict=True):
        block.mul_(columns).mul_(row.unsqueeze(-1))
    return weight


def check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}")


def _blocks(x: Tensor, where: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Blocks of rows: which of them are kept, and the rows, with -inf in those that are not."""
    for kept, part in _pairs(x, where):
        part = part.to(widest(x))
        yield kept, part if kept is None else torch.where(kept.unsqueeze(-1), part, -math.inf)


def _pairs(x: Tensor, where: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Blocks of rows: which of them are kept, and the rows as they are."""
    parts = x.split(_size(x))
    return zip([None] * len(parts) if where is None else where.split(_size(x)), parts, strict=True)


def _size(x: Tensor) -> int:
    """The number of rows in a block: as many as fit into a CPU's caches, and all on other devices."""
    return max(BLOCK // x.shape[1], 1) if eager_on_cpu(x) else max(len(x), 1)


def _softmax(x: Tensor) -> Tensor:
    return softmax(x, may_be_empty=True).p


def _log(mass: Tensor) -> Tensor:
    """The logarithm of a mass; 0 for a prototype whose logits are all -inf."""
    return torch.where(mass == 0, 1, mass).log()
