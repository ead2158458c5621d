"""Variational information distillation: how well the student's map predicts the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch._numerics import own, positive, promote, with_gradients
from kdtorch._reduce import reduce, zeroed
from kdtorch._typing import Bool, Float, ProcessGroup, Reduction, Scalar, checked
from kdtorch.features._maps import PROJECTOR, by_channels, check_channel_axis, check_shape


@checked(learns=("predicted_mean", "log_scale"))
def vid_loss(
    predicted_mean: Float[Tensor, "batch _ _ _"],
    teacher_map: Float[Tensor, "batch _ _ _"],
    log_scale: Float[Tensor, "channels"],
    *,
    eps: Scalar = 1e-5,
    channel_axis: int = 1,
    where: Bool[Tensor, "batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Variational information distillation: the teacher's map should be likely under a Gaussian that the student predicts.

    $$\frac1{CHW}\sum_{c,x}\tfrac12\left[\frac{(\mu_{cx}-t_{cx})^2}{v_c}+\log v_c\right],\qquad
    v_c=\log(1+e^{a_c})+\varepsilon$$

    a is `log_scale`, and x a position. This is the negative logarithm of the likelihood without the constant ½ log 2π.

    Args:
        predicted_mean: μ, `[batch, channels, height, width]`, the output of a regressor on the student's map
            (`kdtorch.nn.VIDLoss` holds one).
        teacher_map: the same shape; constant.
        log_scale: a, `[channels]`, learned with the student. At log(e^(v − ε) − 1) the variance is v.
        eps: ε > 0, the smallest variance; a constant.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        group: the process group that the batch is spread over.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. It may be negative.

    Raises:
        ValueError: shapes that differ, another number of scales than of channels, an ε that is not positive, a channel
            axis other than 1, 2, 3 or its negative, an unknown reduction.
        TypeError: a map that is no floating-point tensor of four axes.

    Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019,
    https://arxiv.org/abs/1904.05835. RepDistiller and mdistiller compute log(1 + e^a) as written, which is inf for a ≥
    89 in float32. If the sizes differ they pool the student's map first; with this function you pool it yourself.

    >>> import torch
    >>> from kdtorch import vid_loss
    >>> mean, t = torch.ones((1, 2, 2, 2)), torch.zeros((1, 2, 2, 2))
    >>> print(f"{vid_loss(mean, t, torch.zeros(2)):.4f}")
    0.5381
    """
    check_channel_axis(channel_axis)
    check_shape("predicted_mean", predicted_mean, "teacher_map", teacher_map, PROJECTOR)
    channels = predicted_mean.shape[channel_axis]
    if len(log_scale) != channels:
        raise ValueError(f"`log_scale` must have one entry per channel, {channels} in all, got {len(log_scale)}")
    eps = positive("eps", eps, predicted_mean, teacher_map, log_scale, constant=True)
    mean, teacher = (by_channels(x, channel_axis) for x in (predicted_mean, teacher_map))
    *_, scale = promote(predicted_mean, teacher_map, log_scale)  # whose gradients are summed over the batch
    (value,) = _likelihood(mean, scale.expand(len(mean), -1), teacher, eps, where)
    return reduce(value, where, reduction, group)


def likelihood_and_gradients(
    mean: Tensor, scale: Tensor, teacher: Tensor, eps: Scalar, where: Tensor | None, *asked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Half the mean of (mean - teacher)^2 / v + log v with v = log(1 + e^scale) + eps, and its two gradients."""
    x, y, scale = promote(mean, teacher, scale)
    where = None if where is None else own(where)
    x, y = (x, y) if where is None else zeroed(where, x, y)
    variance = (eps - functional.logsigmoid(-scale)).unsqueeze(-1)
    root = variance.sqrt()
    # computed from halves, and divided before it is squared, because the difference or its square may overflow
    half = x / 2 - y / 2
    error = half * (2 / root)
    value = (error.square() + variance.log()).mean((1, 2)) / 2
    slope, number = scale.sigmoid(), x.shape[1] * x.shape[2]
    of_variance = (1 / variance - error * (error / variance)).sum(-1) / (2 * number)
    of_scale = torch.where(slope == 0, 0, slope * of_variance)
    (of_scale,) = (of_scale,) if where is None else zeroed(where, of_scale)
    return value, half * (2 / (variance * number)), of_scale


# Written by hand, so that only the gradients are stored until the backward pass; autograd would store the errors and
# both maps.
_likelihood = with_gradients(likelihood_and_gradients, learns=2)
