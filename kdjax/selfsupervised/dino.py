"""DINO: self-distillation with no labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kdjax._collectives import all_sum, size
from kdjax._numerics import (
    Softmax,
    check_state,
    cross_entropy_of_softmax,
    fraction,
    positive,
    softmax,
    sum_of_rows,
    widest,
)
from kdjax._reduce import reduce
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, Scalar, checked


class DINOState(NamedTuple):
    """The running centre of the teacher's outputs.

    Attributes:
        center: `[dim]`, subtracted from the teacher's outputs.

    >>> from kdjax import dino_init
    >>> dino_init(3).center.tolist()
    [0.0, 0.0, 0.0]
    """

    center: Float[Array, "dim"]


def dino_init(dim: int, dtype: Any = jnp.float32) -> DINOState:
    """A centre of zeros.

    Args:
        dim: the width of the outputs.
        dtype: of the centre, float32 or wider.

    Returns:
        The state that `dino_loss` starts from.

    Raises:
        ValueError: a `dim` below 1, a dtype narrower than float32.

    >>> from kdjax import dino_init
    >>> dino_init(3).center.shape
    (3,)
    """
    if dim < 1:
        raise ValueError(f"`dim` must be at least 1, got {dim}")
    if jnp.dtype(dtype) not in (jnp.dtype("float32"), jnp.dtype("float64")):
        raise ValueError(f"`dtype` must be float32 or float64, got {jnp.dtype(dtype).name}")
    return DINOState(jnp.zeros((dim,), dtype))


def dino_teacher_temperature(
    epoch: int | Array, *, warmup: float = 0.04, final: float = 0.04, warmup_epochs: int = 0
) -> jax.Array:
    """The teacher's temperature: linear from `warmup` at epoch 0 to `final` at `warmup_epochs - 1`, then `final`.

    Args:
        epoch: any epoch ≥ 0, an integer or an array.
        warmup: the first temperature.
        final: the last one.
        warmup_epochs: the number of epochs in the warm-up, as in the released `linspace(warmup, final, warmup_epochs)`:
            with 0 the temperature is `final` throughout, with 1 it is `warmup` at epoch 0 and `final` from epoch 1 on.

    Returns:
        The temperature, of the shape of `epoch`.

    Raises:
        ValueError: a temperature that is not positive, negative `warmup_epochs`.

    >>> from kdjax import dino_teacher_temperature
    >>> warmup = {"warmup": 0.04, "final": 0.07, "warmup_epochs": 4}
    >>> [round(float(dino_teacher_temperature(e, **warmup)), 3) for e in range(5)]
    [0.04, 0.05, 0.06, 0.07, 0.07]
    """
    for name, value in (("warmup", warmup), ("final", final)):
        positive(name, value, jnp.zeros(()))
    if warmup_epochs < 0:
        raise ValueError(f"`warmup_epochs` must be at least 0, got {warmup_epochs}")
    if warmup_epochs == 0:
        return jnp.full(jnp.shape(epoch), final)
    return optax.schedules.linear_schedule(warmup, final, max(warmup_epochs - 1, 1))(jnp.asarray(epoch, float))


def check_views(views: int, teacher_views: int, given: str) -> None:
    if not 1 <= teacher_views <= views or views < 2:
        raise ValueError(
            "the views must fit: at least 1 teacher view, at least 2 student views, the first of them the teacher's, "
            f"got {given}"
        )


@checked
def dino_loss(
    student: Float[Array, "student_views batch dim"],
    teacher: Float[Array, "teacher_views batch dim"],
    state: DINOState,
    *,
    teacher_temperature: Scalar = 0.04,
    student_temperature: Scalar = 0.1,
    center_momentum: Scalar = 0.9,
    teacher_targets: Float[Array, "teacher_views batch dim"] | None = None,
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    update: bool = True,
) -> tuple[jax.Array, DINOState]:
    r"""DINO: the student predicts, from one view, the teacher's centred and sharpened output for another view.

    $$-\frac1N\sum_{u\ne v}\sum_k q_{uk}\log p_{vk},\qquad q_u=\mathrm{softmax}\big((t_u-c)/\tau_t\big),\quad
    p_v=\mathrm{softmax}(s_v/\tau_s)$$

    over the N = U·V − U pairs of different views. The centre c is used first, and then becomes m·c + (1 − m)·mean(t),
    the mean over views and kept examples. This is a cross-entropy, so it is not 0 if student and teacher are equal.

    Args:
        student: `[student_views, batch, dim]`; the first `teacher_views` of them are the teacher's views.
        teacher: `[teacher_views, batch, dim]`; constant.
        state: the centre, from `dino_init(dim)` or the previous step.
        teacher_temperature: τ_t > 0, a constant; `dino_teacher_temperature` returns its warm-up.
        student_temperature: τ_s > 0; an array has a gradient.
        center_momentum: m in [0, 1], a constant.
        teacher_targets: `[teacher_views, batch, dim]`, probabilities to use instead of the teacher's q, for example
            from `sinkhorn_knopp`; constant. `teacher` is then not used, and the centre does not change.
        where: `[batch]`, False for examples that are left out, also from the centre.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        update: False leaves the state unchanged, for every micro-batch of a step except the last.

    Returns:
        The loss and the next state, in the state's dtype. A batch that would make the centre non-finite, or one with no
        kept example, leaves it unchanged.

    Raises:
        ValueError: views that do not fit, a temperature that is not positive, a momentum outside [0, 1], a state
            in half precision, an unknown reduction.
        TypeError: a shape or dtype that does not fit.

    Caron et al., *Emerging Properties in Self-Supervised Vision Transformers*, ICCV 2021,
    https://arxiv.org/abs/2104.14294. The sum over pairs is computed as Σ_v (Σ_{u≠v} q_u)·log p_v, with one log-softmax
    for each view; the released code computes one for each pair.

    >>> import jax.numpy as jnp
    >>> from kdjax import dino_init, dino_loss
    >>> views = jnp.array([[[2.0, 0.0, -1.0]], [[1.0, 1.0, -1.0]]])
    >>> loss, state = dino_loss(views, views, dino_init(3))
    >>> print(f"{loss:.4f}", [round(float(x), 2) for x in state.center])
    5.3466 [0.15, 0.05, -0.1]
    """
    views, teacher_views = student.shape[0], teacher.shape[0]
    check_views(views, teacher_views, f"student {list(student.shape)} and teacher {list(teacher.shape)}")
    check_state(state)
    teacher, dtype = jax.lax.stop_gradient(teacher), widest(student, teacher)
    teacher_temperature = positive("teacher_temperature", teacher_temperature, student, teacher, constant=True)
    student_temperature = positive("student_temperature", student_temperature, student, teacher)
    momentum = fraction("center_momentum", center_momentum, state.center)

    views_of = student.swapaxes(0, 1)
    if teacher_targets is not None:
        targets = teacher_targets.swapaxes(0, 1)
        pairs = _pairs_of_targets(views_of, targets, student_temperature, where=where)
        return reduce(pairs, where, reduction, axis_name), state
    center = jnp.broadcast_to(state.center.astype(dtype), (teacher.shape[1], 1, teacher.shape[2]))  # for each example
    pairs = _pairs(views_of, teacher.swapaxes(0, 1), center, teacher_temperature, student_temperature, where=where)
    loss = reduce(pairs, where, reduction, axis_name)
    if not update:
        return loss, state

    if where is not None:
        teacher = jnp.where(where[None, :, None], teacher, 0)
    total = sum_of_rows(teacher.astype(dtype))[0]
    batch = size(axis_name) * teacher.shape[1]
    kept = jnp.asarray(batch, dtype) if where is None else all_sum(where.sum(dtype=dtype), axis_name)
    return loss, DINOState(moved_center(state.center, all_sum(total, axis_name), kept * teacher_views, momentum))


def moved_center(center: jax.Array, total: jax.Array, number: jax.Array, momentum: float | Array) -> jax.Array:
    """m times the centre plus 1 - m times the mean; the old centre if there is no mean, or if it is not finite."""
    mean = (total / jnp.maximum(number, 1)).astype(center.dtype)
    padding = jnp.isneginf(mean)
    moved = jnp.where(padding, center, momentum * center + (1 - momentum) * mean)
    return jnp.where(jnp.isfinite(moved).all() & (number > 0), moved, center)


def pairs_and_gradient(
    x: jax.Array, y: jax.Array, center: jax.Array, teacher_temperature: Scalar, temperature: Scalar
) -> tuple[jax.Array, jax.Array]:
    """Value and gradient for the student's views, on the axis before the last, and the teacher's, which are centred."""
    views = jnp.moveaxis(y - center, -2, 0)
    return pairs_of_targets_and_gradient(x, jnp.moveaxis(softmax(views, teacher_temperature).p, 0, -2), temperature)


def pairs_of_targets_and_gradient(x: jax.Array, q: jax.Array, temperature: Scalar) -> tuple[jax.Array, jax.Array]:
    """Value and gradient for the student's views and the teacher's probabilities.

    Written by hand, because XLA on a CPU writes an array to memory before it reduces it. So the sums of products are
    computed for one view at a time, whose arrays fit into the caches, and the gradient computes exponentials again.
    """
    x, q = (jnp.moveaxis(a, -2, 0) for a in (x, q))
    views, teacher_views = len(x), len(q)
    every = sum(q[1:], start=q[0])  # XLA on a CPU takes sixty times as long for a sum over a leading axis
    q, every = jax.lax.optimization_barrier((q, every))  # otherwise XLA computes softmaxes again for every view
    own = jnp.maximum(every[None] - q, 0)  # the sum of the teacher's other views
    p = softmax(x, temperature)

    def one(target: jax.Array, view: jax.Array, *p: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, _ = cross_entropy_of_softmax(Softmax(*p), view, target, temperature)
        return value, target.sum(-1, keepdims=True)

    targets = [*own, *[every] * (views - teacher_views)]
    value, total = map(jnp.stack, zip(*map(one, targets, x, *p), strict=True))

    def gradient(part: slice, target: jax.Array) -> jax.Array:
        log_p = (x[part] - p.peak[part]) / temperature - p.log_total[part]
        return (jnp.exp(log_p) * total[part] - target) / temperature

    parts = [gradient(slice(teacher_views), own), gradient(slice(teacher_views, None), every[None])]
    number = views * teacher_views - teacher_views
    return value.sum(0) / number, jnp.moveaxis(jnp.concatenate(parts), 0, -2) / number


_pairs = rowwise(pairs_and_gradient)
_pairs_of_targets = rowwise(pairs_of_targets_and_gradient)
