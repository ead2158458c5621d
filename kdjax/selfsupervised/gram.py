"""Gram anchoring: keeps the cosines between an image's patches close to those of a teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from kdjax._collectives import all_gather, all_gather_constant
from kdjax._numerics import HIGHEST, check_fixed, promote, unit
from kdjax._reduce import reduce, zero_masked
from kdjax._rowwise import rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Reduction, checked

Clip = Literal["none", "both", "teacher"]
BLOCK = 2**17  # the number of products that are computed at once, or more if one image has more


@checked
def gram_loss(
    student: Float[Array, "batch patches student_dim"],
    teacher: Float[Array, "batch patches teacher_dim"],
    *,
    normalize: bool = True,
    image_level: bool = True,
    clip_negative: Clip = "none",
    where: Bool[Array, "batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Gram anchoring: mean squared error between the products of all pairs of patches of student and teacher.

    $$\frac1{P^2}\sum_{ij}\big(\hat s_i\cdot\hat s_j-\hat t_i\cdot\hat t_j\big)^2$$

    for an image with P patches, which are normalised to unit length unless `normalize=False`. With `image_level=False`
    j runs over the patches of all images of the batch.

    Args:
        student: `[batch, patches, student_dim]`.
        teacher: `[batch, patches, teacher_dim]`, of any width; constant. In DINOv3 the teacher is an early average of
            the student.
        normalize: whether patches are divided by their lengths.
        image_level: whether a patch is compared only with the patches of its own image.
        clip_negative: whose negative products become 0: `"none"`, `"both"`, or `"teacher"`. A clipped product has no
            gradient.
        where: `[batch]`, False for images that are left out, also as partners of other images.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.

    Returns:
        A scalar, or `[batch]` with `reduction="none"`. The products of a zero patch are 0, and it has no gradient if
        patches are normalised.

    Raises:
        ValueError: an unknown `clip_negative` or reduction.
        TypeError: a shape or dtype that does not fit.

    Siméoni et al., *DINOv3*, 2025, https://arxiv.org/abs/2508.10104. The released recipes keep negative products; the
    default of the released class is to clip those of both sides. Its option `remove_only_teacher_neg` is also meant to
    clip the student where both are negative, but never does, because the teacher's products are already 0.

    >>> import jax.numpy as jnp
    >>> from kdjax import gram_loss
    >>> student = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> teacher = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    >>> print(f"{gram_loss(student, teacher):.4f}")
    0.5000
    """
    check_clip(clip_negative)
    check_fixed("gram_loss", batch=student.shape[0], patches=student.shape[1])
    if image_level:
        return reduce(_images(normalize, clip_negative)(student, teacher, where=where), where, reduction, axis_name)
    x, y = zero_masked(where, *promote(student, teacher))
    x, y = (unit(x), unit(jax.lax.stop_gradient(y))) if normalize else (x, jax.lax.stop_gradient(y))
    kept = jnp.ones(len(x), bool) if where is None else where
    number, patches = all_gather_constant(kept, axis_name).sum(), student.shape[1]
    every = [a.reshape(-1, a.shape[2]) for a in (all_gather(x, axis_name), all_gather_constant(y, axis_name))]

    @jax.checkpoint
    def of_image(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        ours, theirs = (_product(a, b) for a, b in zip(image, every, strict=True))
        gap, _ = _gap(ours, theirs, normalize, clip_negative)
        return jnp.square(gap).sum()

    value = jax.lax.map(of_image, (x, y)) / (jnp.maximum(number, 1) * patches**2).astype(x.dtype)
    return reduce(value, where, reduction, axis_name)


def check_clip(clip_negative: str) -> None:
    if clip_negative not in get_args(Clip):
        raise ValueError(f'`clip_negative` must be one of "none", "both", "teacher", got {clip_negative!r}')


@functools.cache
def _images(normalize: bool, clip_negative: Clip) -> Callable[..., jax.Array]:
    return rowwise(functools.partial(image_and_gradient, normalize, clip_negative))


def image_and_gradient(normalize: bool, clip_negative: Clip, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Value and gradient for images `[*batch, patches, dim]`, `BLOCK` products at a time.

    Written by hand, it takes three matrix products instead of six.
    """

    def of_image(image: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = image
        if normalize:
            y = unit(y)
            x, pull = jax.vjp(unit, x)
        gap, felt = _gap(_product(x, x), _product(y, y), normalize, clip_negative)
        gradient = jnp.matmul(felt, x, precision=HIGHEST) * (4 / len(x) ** 2)
        return jnp.square(gap).mean(), pull(gradient)[0] if normalize else gradient

    batch, patches = x.shape[:-2], x.shape[-2]
    images = tuple(a.reshape(-1, *a.shape[-2:]) for a in (x, y))
    value, gradient = jax.lax.map(of_image, images, batch_size=max(BLOCK // patches**2, 1))
    return value.reshape(batch), gradient.reshape(x.shape)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b.T, precision=HIGHEST)


def _gap(ours: jax.Array, theirs: jax.Array, normalize: bool, clip_negative: Clip) -> tuple[jax.Array, jax.Array]:
    """The student's products minus the teacher's, and the same with 0 where the clipping has no gradient.

    For rows of unit length, a product that is 0 except for rounding is clipped too.
    """
    theirs = theirs if clip_negative == "none" else jnp.where(theirs <= 0, 0, theirs)
    if clip_negative != "both":
        return (gap := ours - theirs), gap
    clipped = ours <= (8 * jnp.finfo(ours.dtype).eps if normalize else 0)
    gap = jnp.where(clipped, 0, ours) - theirs
    return gap, jnp.where(clipped, 0, gap)
