"""Feature regression: pulls the student's features towards the teacher's, entry by entry."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from kdtorch._numerics import positive
from kdtorch._reduce import reduce
from kdtorch._rowwise import rowwise
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked


@checked(dtensor="any")
def bce_loss(
    student: Float[Tensor, "*batch features"],
    teacher: Float[Tensor, "*batch features"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Sigmoid cross-entropy between features, with the teacher's as targets.

    $$-\tfrac1D\sum_d\left[t_d\log\sigma(s_d)+(1-t_d)\log(1-\sigma(s_d))\right]$$

    Args:
        student: `[*batch, features]`, logits.
        teacher: the same shape; constant. With targets in [0, 1], such as the outputs of a sigmoid, the loss is bounded
            below. With other targets it is not; they are allowed because the founding code uses them.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    The founding repository's BCE, which is PyTorch's `binary_cross_entropy_with_logits`; the value is the same.

    >>> import torch
    >>> from kdtorch import bce_loss
    >>> s, t = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 1.0]])
    >>> print(f"{bce_loss(s, t):.4f}")
    0.4100
    """
    return reduce(_bce(student, teacher, where=where), where, reduction, group)


def bce_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of -y log sigmoid(x) - (1 - y) log(1 - sigmoid(x)), and its gradient (sigmoid(x) - y) / D."""
    value = functional.binary_cross_entropy_with_logits(x, y, reduction="none").mean(-1)
    return value, (x.sigmoid() - y) / x.shape[-1]


# Written by hand, so that only the gradients are stored until the backward pass; autograd would store both inputs.
_bce = rowwise(bce_and_gradient)


@checked(dtensor="any")
def mse_loss(
    student: Float[Tensor, "*batch features"],
    teacher: Float[Tensor, "*batch features"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Mean squared error between features.

    $$\tfrac1D\sum_d(s_d-t_d)^2$$

    Args:
        student: `[*batch, features]`.
        teacher: the same shape; constant.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015, https://arxiv.org/abs/1412.6550 (its hint loss is
    half of the sum instead of the mean).

    >>> import torch
    >>> from kdtorch import mse_loss
    >>> s, t = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    >>> print(f"{mse_loss(s, t):.4f}")
    2.5000
    """
    return reduce(_mse(student, teacher, where=where), where, reduction, group)


def mse_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of (x - y)^2, and its gradient 2 (x - y) / D."""
    difference = x - y
    return difference.square().mean(-1), difference * (2 / x.shape[-1])


_mse = rowwise(mse_and_gradient)


@checked(dtensor="any")
def smooth_l1_loss(
    student: Float[Tensor, "*batch features"],
    teacher: Float[Tensor, "*batch features"],
    *,
    beta: Scalar = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Smooth L1 error between features: quadratic below β, linear above.

    $$\tfrac1D\sum_d\begin{cases}(s_d-t_d)^2/2\beta&\text{if }|s_d-t_d|<\beta\\|s_d-t_d|-\beta/2&\text{otherwise}\end{cases}$$

    Args:
        student: `[*batch, features]`.
        teacher: the same shape; constant.
        beta: β > 0, where the two pieces meet; a constant. The loss is the Huber loss with δ = β, divided by β.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`.

    Raises:
        ValueError: a β that is not positive, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Girshick, *Fast R-CNN*, ICCV 2015, https://arxiv.org/abs/1504.08083 (β = 1).

    >>> import torch
    >>> from kdtorch import smooth_l1_loss
    >>> s, t = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 4.0]])
    >>> print(f"{smooth_l1_loss(s, t):.4f}")
    0.8125
    """
    beta = positive("beta", beta, student, teacher, constant=True)
    return reduce(_smooth_l1(student, teacher, beta, where=where), where, reduction, group)


def smooth_l1_and_gradient(x: Tensor, y: Tensor, beta: Scalar) -> tuple[Tensor, Tensor]:
    """beta times the mean of c (z - c / 2) with z = (x - y) / beta and c = z within [-1, 1], and its gradient c / D."""
    z = (x - y) / beta
    slope = z.clamp(-1, 1)
    return beta * (slope * (z - slope / 2)).mean(-1), slope / x.shape[-1]


_smooth_l1 = rowwise(smooth_l1_and_gradient)
