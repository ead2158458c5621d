"""Channel-wise distillation: where in the image each channel of a map is active."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax._numerics import positive, times_square
from kdjax._reduce import reduce
from kdjax._rowwise import kl_divergence
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked
from kdjax.features._maps import PROJECTOR, by_channels, check_channel_axis, check_shape


@checked
def cwd_loss(
    student_map: Float[Array, "batch _ _ _"],
    teacher_map: Float[Array, "batch _ _ _"],
    *,
    temperature: Scalar = 1.0,
    channel_axis: int = -1,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Channel-wise distillation: a softmax over the positions of each channel, which should match the teacher's.

    $$\frac{T^2}C\sum_c\mathrm{KL}(q_c\,\|\,p_c),\qquad p_c=\mathrm{softmax}(s_c/T),\quad q_c=\mathrm{softmax}(t_c/T)$$

    $s_c$ and $t_c$ are channel c of the two maps, and the softmax is over all positions.

    Args:
        student_map: `[batch, height, width, channels]`, features or the scores of each class.
        teacher_map: the same shape; constant.
        temperature: T > 0; an array has a gradient. The factor T² keeps the gradient's size as T grows.
        channel_axis: where the channels are; the default is -1 in kdjax and 1 in kdtorch.
        where: `[batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. It is 0 where student and teacher agree up to a number added to
        each channel, and for maps of one position; it is never negative. A position at -inf in both is left out of its
        channel, and the loss is inf where the student gives -inf to a position that the teacher uses.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive, a channel axis other than 1, 2, 3 or its
            negative, an unknown reduction.
        TypeError: a map that is no floating-point array of four axes.

    Shu et al., *Channel-wise Knowledge Distillation for Dense Prediction*, ICCV 2021, https://arxiv.org/abs/2011.13256.
    The authors' code takes the logarithm of the student's softmax, and is inf or NaN if a float32 channel spans more
    than 103 T; mmrazor's code does not stop the gradient of the teacher.

    >>> import jax.numpy as jnp
    >>> from kdjax import cwd_loss
    >>> s = jnp.arange(8.0).reshape(1, 2, 2, 2)
    >>> print(f"{cwd_loss(s, jnp.ones_like(s), temperature=2.0):.4f}")
    2.2156
    """
    check_channel_axis(channel_axis)
    check_shape("student_map", student_map, "teacher_map", teacher_map, PROJECTOR)
    temperature = positive("temperature", temperature, student_map, teacher_map)
    student, teacher = (by_channels(x, channel_axis) for x in (student_map, teacher_map))
    kept = None if where is None else jnp.broadcast_to(where[:, None], student.shape[:2])
    divergence = kl_divergence(student, teacher, temperature, where=kept).mean(1)
    return reduce(times_square(temperature, divergence), where, reduction, axis_name)
