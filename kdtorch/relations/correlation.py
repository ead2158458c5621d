"""Compares the kernels between samples of student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlosses.settings import whole
from kdtorch._numerics import positive, scalar, unit, unit_pull
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked
from kdtorch.relations._pairs import Pairs, blocks, gather, over_pairs, products, through_products


@checked
def correlation_loss(
    student: Float[Tensor, "batch student_dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    *,
    gamma: Scalar = 0.4,
    order: int = 2,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Correlation congruence: mean squared error between two matrices of a Gaussian kernel, expanded in a Taylor series.

    $$\frac1B\sum_j\big(K_{ij}(s)-K_{ij}(t)\big)^2,\qquad K_{ij}(x)=e^{-2\gamma}\sum_{n=0}^P\frac{(2\gamma\cos(x_i,x_j))^n}{n!}$$

    for example i, over every example j of the batch, i included.

    Args:
        student: `[batch, student_dim]`.
        teacher: `[batch, teacher_dim]`, of any width; constant.
        gamma: γ > 0, of the kernel exp(-γ‖x − y‖²) on unit rows; the larger, the narrower.
        order: P ≥ 1, the last power of the series.
        where: `[batch]`, False for examples that are left out, both as i and as j.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`, the mean over the partners of each example.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. A zero row has cosine 0 with every row, itself included, with
        gradient 0.

    Raises:
        ValueError: a `gamma` that is not positive, an `order` that is not a whole number of at least 1, an unknown
            reduction.
        TypeError: a shape or dtype that does not fit.

    Peng et al., *Correlation Congruence for Knowledge Distillation*, ICCV 2019, https://arxiv.org/abs/1904.01802, which
    weights this loss by 0.003. The losses of this name in RepDistiller and torchdistill are different: RepDistiller's
    compares products of differences of neighbours in the batch.

    >>> import torch
    >>> from kdtorch import correlation_loss
    >>> s = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> t = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> print(f"{correlation_loss(s, t):.4f}")
    0.1266
    """
    whole(1, order=order)
    gamma = scalar(positive("gamma", gamma, student, teacher, constant=True), student, teacher)
    rows = gather(student, teacher, where, reduction, group)
    return _loss(rows, where, reduction, group, gamma, order)


def _evaluate(pairs: Pairs, gamma: Tensor, order: int) -> tuple[Tensor, Tensor]:
    x, number = unit(pairs.student), len(pairs.student)
    cosine, other = _cosines(x, pairs.ours), _cosines(unit(pairs.teacher), pairs.ours)
    factors = _factors(gamma, order)
    value = x.new_empty(len(cosine))
    for block in blocks(len(cosine), x):
        gap, slope = _kernel(cosine[block], factors)
        gap.sub_(_kernel(other[block], factors)[0])
        value[block] = torch.linalg.vecdot(gap, gap) / number
        cosine[block] = gap.mul_(slope).mul_(2 / number * pairs.weights[block, None])
    if not pairs.asked:
        return value, x.new_empty(0)
    cosine.diagonal(pairs.ours.start).zero_()  # the kernel of a row with itself is constant
    return value, unit_pull(pairs.student, through_products(cosine, x, pairs.ours))


def _cosines(x: Tensor, ours: slice) -> Tensor:
    """The cosines of this rank's rows with all rows, given unit rows; 1 for a row with itself, 0 for a row of 0."""
    product = products(x, ours)
    product.diagonal(ours.start).copy_((x[ours] != 0).any(-1))
    return product


def _factors(gamma: Tensor, order: int) -> list[float]:
    """The coefficients of the powers of the cosine, from power 0 on."""
    factors = [(-2 * gamma).exp()]
    for n in range(1, order + 1):
        factors.append(factors[-1] * (2 * gamma / n))
    return [factor.item() for factor in factors]


def _kernel(cosine: Tensor, factors: list[float]) -> tuple[Tensor, Tensor]:
    """The kernel without its constant term, which cancels, by Horner's rule, and its derivative."""
    total, slope = torch.full_like(cosine, factors[-1]), torch.full_like(cosine, factors[-1])
    for factor in factors[-2:0:-1]:
        total.mul_(cosine).add_(factor)
        slope.mul_(cosine).add_(total)
    return total.mul_(cosine), slope


_loss = over_pairs(_evaluate, "Tensor gamma, int order, ")
