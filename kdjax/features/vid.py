"""Variational information distillation: how well the student's map predicts the teacher's."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kdjax._numerics import positive, promote
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked
from kdjax.features._maps import PROJECTOR, check_channel_axis, check_shape


@checked
def vid_loss(
    predicted_mean: Float[Array, "batch _ _ _"],
    teacher_map: Float[Array, "batch _ _ _"],
    log_scale: Float[Array, "channels"],
    *,
    eps: Scalar = 1e-5,
    channel_axis: int = -1,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Variational information distillation: the teacher's map should be likely under a Gaussian that the student predicts.

    $$\frac1{CHW}\sum_{c,x}\tfrac12\left[\frac{(\mu_{cx}-t_{cx})^2}{v_c}+\log v_c\right],\qquad
    v_c=\log(1+e^{a_c})+\varepsilon$$

    a is `log_scale`, and x a position. This is the negative logarithm of the likelihood without the constant ½ log 2π.

    Args:
        predicted_mean: μ, `[batch, height, width, channels]`, the output of a regressor on the student's map
            (`kdjax.nn.VIDLoss` holds one).
        teacher_map: the same shape; constant.
        log_scale: a, `[channels]`, learned with the student. At log(e^(v − ε) − 1) the variance is v.
        eps: ε > 0, the smallest variance; a constant.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. It may be negative.

    Raises:
        ValueError: shapes that differ, another number of scales than of channels, an ε that is not positive, a channel
            axis other than 1, 2, 3 or its negative, an unknown reduction.
        TypeError: a map that is no floating-point array of four axes.

    Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019,
    https://arxiv.org/abs/1904.05835. RepDistiller and mdistiller compute log(1 + e^a) as written, which is inf for a ≥
    89 in float32. If the sizes differ they pool the student's map first; with this function you pool it yourself.

    >>> import jax.numpy as jnp
    >>> from kdjax import vid_loss
    >>> mean, t = jnp.ones((1, 2, 2, 2)), jnp.zeros((1, 2, 2, 2))
    >>> print(f"{vid_loss(mean, t, jnp.zeros(2)):.4f}")
    0.5381
    """
    check_channel_axis(channel_axis)
    check_shape("predicted_mean", predicted_mean, "teacher_map", teacher_map, PROJECTOR)
    channels = predicted_mean.shape[channel_axis]
    if len(log_scale) != channels:
        raise ValueError(f"`log_scale` must have one entry per channel, {channels} in all, got {len(log_scale)}")
    eps = positive("eps", eps, predicted_mean, teacher_map, log_scale, constant=True)
    mean, teacher = (jnp.moveaxis(x, channel_axis, -1) for x in (predicted_mean, teacher_map))
    *_, scale = promote(predicted_mean, teacher_map, log_scale)  # its gradient is summed over the batch
    value = _likelihood(mean, jnp.broadcast_to(scale, (mean.shape[0], channels)), teacher, eps, where=where)
    return reduce(value, where, reduction, axis_name)


def likelihood_and_gradients(
    x: jax.Array, scale: jax.Array, y: jax.Array, eps: Scalar
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Half the mean of (x - y)^2 / v + log v with v = log(1 + e^scale) + eps, and its two gradients."""
    variance = (jnp.logaddexp(scale, 0) + eps)[:, None, None]
    # computed from halves, and divided before it is squared, because the difference or its square may overflow
    half = x / 2 - y / 2
    error = half * (2 / jnp.sqrt(variance))
    value = (jnp.square(error) + jnp.log(variance)).mean((1, 2, 3)) / 2
    slope, number = jax.nn.sigmoid(scale), math.prod(x.shape[1:])
    of_variance = (1 / variance - error * (error / variance)).sum((1, 2)) / (2 * number)
    return value, half * (2 / (variance * number)), jnp.where(slope == 0, 0, slope * of_variance)


_likelihood = rowwise(likelihood_and_gradients, learns=2)
