"""Knowledge distillation from the teacher's largest logits alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kdjax._collectives import class_max, class_sum, on_first
from kdjax._linear import put
from kdjax._numerics import check_classes, fraction, kl_and_gradient, positive, times_square, valid_index
from kdjax._reduce import reduce, zero_masked
from kdjax._rowwise import kl_divergence, rowwise
from kdjax._typing import Array, AxisName, Bool, Float, Integer, Reduction, Scalar, checked, describe
from kdjax.logits.jsd import jensen_shannon, jsd_and_gradient
from kdjax.logits.reverse_kl import reverse_kl_and_gradient, reverse_kl_divergence


@checked
def topk_kl_loss(
    student_logits: Float[Array, "*batch classes"],
    values: Float[Array, "*batch kept"],
    indices: Integer[Array, "*batch kept"],
    rest: Float[Array, "*batch"] | Mapping[str, Float[Array, "*batch"]] | None = None,
    *,
    temperature: Scalar = 1.0,
    tail: Literal["bucket", "renormalize"] = "bucket",
    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl",
    beta: float = 0.5,
    kept: Bool[Array, "*batch kept"] | None = None,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    r"""KL divergence to a teacher of which k logits per example are kept; all others count as one class, or are left out.

    $$T^2\,\mathrm{KL}(q\,\|\,p),\qquad p=\mathrm{softmax}\big((s_K, \bar s)/T\big),\quad
    q=\mathrm{softmax}\big((t_K, \bar t)/T\big),\qquad \bar x=T\log\sum_{c\notin K}e^{x_c/T}$$

    over the k kept classes K and, with `tail="bucket"`, one more for the rest, which `tail="renormalize"` leaves out.
    `divergence` compares p and q otherwise.

    Args:
        student_logits: `[*batch, classes]`.
        values: `[*batch, kept]`, the teacher's logits of the kept classes, or their logarithms of probabilities at
            temperature 1, with `rest` shifted by the same number; constant.
        indices: `[*batch, kept]`, the classes; one outside `0 .. classes - 1` gives NaN for that example. A class that
            an example has twice makes it NaN.
        rest: `[*batch]`, t̄, the logit of all other classes together at the temperature of the call, which cannot be
            computed from its value at another temperature. `record_teacher` keeps it for each of its `temperatures`,
            and `TeacherCache.read` returns it with its temperature, as in `{"4.0": rest}`; a call at another
            temperature is then an error, or NaN if `temperature` is an array. If `rest` is an array alone, its
            temperature cannot be checked. The bucket needs `rest`, unless all classes are kept; it is -inf where
            nothing is left. It is constant, also where the temperature is learned.
        temperature: T > 0; an array has a gradient.
        tail: `"bucket"` compares the whole mass of the rest too. The loss is then a lower bound of the full KL, and
            equal to it if k is the number of classes or if student and teacher distribute the rest in the same way.
            `"renormalize"` compares the kept classes among themselves, at any temperature; what the student gives to
            the rest has no effect. For the student's whole softmax against the teacher's kept classes alone, normalised
            to sum to 1, take the bucket with a `rest` of -inf.
        divergence: `"kl"`, T² KL(q‖p) as above; `"reverse_kl"`, T² KL(p‖q) as in `reverse_kl_loss`; `"jsd"`, as in
            `jsd_loss`, without T². If all classes are kept, it is equal to the loss of that name.
        beta: β from 0 to 1 of `divergence="jsd"`, a number; the others do not use it.
        kept: `[*batch, kept]`, False for entries that are padding, where examples keep different numbers of classes; their
            values and indices may be anything. Where all entries of an example are padding, the bucket compares one class
            with itself, which gives 0, and renormalizing has nothing to compare, which gives NaN.
        where: `[*batch]`, False for examples that are left out.
        reduction: `"mean"`, `"sum"`, or `"none"` for `[*batch]`.
        axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
        class_axis_name: the mesh axis that the classes are spread over, inside `shard_map`.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where the two distributions agree, never negative, inf
        where the divergence is (KL(q‖p) where the student gives -inf to a class that the teacher uses), and NaN where
        everything that is compared of one of them is -inf.

    Raises:
        ValueError: a temperature that is not positive, an unknown tail, divergence or reduction, a β outside 0 to 1,
            fewer than 2 classes, more classes kept than there are, no `rest` for the bucket, or one of another
            temperature.
        TypeError: a shape or dtype that does not fit.

    Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, https://arxiv.org/abs/1503.02531, on a
    part of the classes. The mass of the rest is computed as a log-sum-exp over the student's other logits. One minus
    the sum of the kept probabilities would lose all precision where that sum is close to 1.

    >>> import jax.numpy as jnp
    >>> from kdjax import topk_kl_loss
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0]])
    >>> kept, rest = jnp.array([[1, 0]]), jnp.array([-1.0])
    >>> print(f"{topk_kl_loss(s, t, kept, rest):.4f}")
    0.4112
    """
    first, classes = check_classes(student_logits, class_axis_name, axis_name)
    shard = None if class_axis_name is None else (first, student_logits.shape[-1])
    temperature = positive("temperature", temperature, student_logits, values)
    compared, values, indices, left, settings = recorded(
        "topk_kl_loss",
        classes,
        values,
        indices,
        rest,
        temperature,
        tail,
        divergence,
        beta,
        kept,
        where,
        shard,
    )
    over = {"where": where, "class_axis_name": class_axis_name}
    if tail == "renormalize":
        own = jnp.take_along_axis(student_logits, jnp.maximum(indices, 0), axis=-1)
        value = _ROWS[compared](jnp.where(indices < 0, -jnp.inf, own), values, *settings, **over)
    else:
        value = _TOPK[compared](student_logits, values, indices, left, *settings, **over)
    return reduce(value if divergence == "jsd" else times_square(temperature, value), where, reduction, axis_name)


class Recorded(NamedTuple):
    """A teacher's kept classes, checked. An index below 0 is no class; `rest` is `[*batch, 1]`; T ends the settings."""

    divergence: str
    values: jax.Array
    indices: jax.Array
    rest: jax.Array
    settings: tuple[Scalar, ...]


def recorded(
    loss: str,
    classes: int,
    values: Array,
    indices: Array,
    rest: Array | Mapping[str, Array] | None,
    temperature: Scalar,
    tail: str,
    divergence: str,
    beta: float,
    kept: Array | None,
    where: Array | None,
    shard: tuple[Array | int, int] | None = None,
) -> Recorded:
    """What a student's logits are compared with; NaN for an example whose values cannot be used.

    `classes` is the number of classes on all devices. `shard` is the first class and the number of classes on this
    device; classes of other devices become padding.
    """
    entries = indices.shape[-1]
    if tail not in ("bucket", "renormalize"):
        raise ValueError(f'`tail` must be one of "bucket", "renormalize", got {tail!r}')
    if divergence not in ("kl", "reverse_kl", "jsd"):
        raise ValueError(f'`divergence` must be one of "kl", "reverse_kl", "jsd", got {divergence!r}')
    if entries < 1 or (kept is None and entries > classes):
        raise ValueError(
            f"`indices` must hold from 1 to {classes} classes an example, as many as there are, got {entries}"
        )
    if tail == "bucket" and rest is None and (kept is not None or entries < classes):
        raise ValueError(
            f'`rest` must be given with tail="bucket" where {entries} of {classes} classes are kept, got None; '
            'leave the rest out by tail="renormalize"'
        )
    weight = fraction("beta", beta, values)
    ends = "kl" if weight == 0 else "reverse_kl" if weight == 1 else divergence
    compared = ends if divergence == "jsd" else divergence
    indices, values = zero_masked(where, indices, values)
    indices, factor = valid_index(indices if kept is None else jnp.where(kept, indices, 0), classes)
    if kept is not None:
        indices, values = jnp.where(kept, indices, -1), jnp.where(kept, values, -jnp.inf)
    places = jnp.sort(indices, -1)
    twice = ((jnp.diff(places, axis=-1) == 0) & (places[..., 1:] >= 0)).any(-1, keepdims=True)
    if shard is not None:
        indices = indices - shard[0]
        own = (indices >= 0) & (indices < shard[1])
        indices, values = jnp.where(own, indices, -1), jnp.where(own, values, -jnp.inf)
    left = jnp.full_like(values[..., 0], -jnp.inf) if rest is None else _rest_at(loss, rest, temperature, values)
    values = jnp.where(twice | jnp.isnan(left)[..., None] | jnp.isnan(factor).any(-1, keepdims=True), jnp.nan, values)
    settings = (weight, temperature) if compared == "jsd" else (temperature,)
    return Recorded(compared, values, indices, left[..., None], settings)


def _rest_at(loss: str, rest: Array | Mapping[str, Array], temperature: Scalar, values: Array) -> Array:
    """The logit of the rest at the temperature of the call, which must be one that it was recorded for."""
    given = {f'rest["{name}"]': x for name, x in rest.items()} if isinstance(rest, Mapping) else {"rest": rest}
    for name, x in given.items():
        if not (isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.shape == values.shape[:-1]):
            raise TypeError(
                f"{loss}: `{name}` must be Float[Array, '*batch'], got {describe(x)} beside values {describe(values)}"
            )
    if not isinstance(rest, Mapping):
        return rest
    try:
        recorded = {float(name): x for name, x in rest.items()}
    except ValueError:
        raise ValueError(
            '`rest` must be an array, or arrays by their temperature, as in {"4.0": ...}, got the names '
            f"{list(rest)}; `TeacherCache.read(index, temperature=4.0)` makes it"
        ) from None
    if isinstance(temperature, jax.Array):  # its value cannot be read
        found = jnp.full_like(values[..., 0], jnp.nan)
        for one, x in recorded.items():
            found = jnp.where(temperature.astype(jnp.float32) == one, x, found)
        return found
    if temperature not in recorded:
        raise ValueError(
            f"`rest` was recorded for the temperatures {sorted(recorded)}, got `temperature` {temperature}; read it for "
            'that one, or give no rest, with tail="renormalize"'
        )
    return recorded[temperature]


def topk_and_gradient(
    divergence_and_gradient: Callable[..., tuple[jax.Array, jax.Array]],
    x: jax.Array,
    values: jax.Array,
    indices: jax.Array,
    rest: jax.Array,
    *settings: Scalar,
    class_axis_name: AxisName | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A divergence over the classes of `indices` and one class for the rest, and its gradient over all classes.

    An index below 0 stands for no class; `rest` is `[*batch, 1]`. The gradient is written by hand: nothing else is
    stored, and it shares weights with the value. With classes spread over devices, each device compares its own
    classes, and the first device also compares the rest.
    """
    temperature = settings[-1]
    none, places = indices < 0, jnp.where(indices < 0, x.shape[-1], indices)
    own = jnp.where(none, -jnp.inf, jnp.take_along_axis(x, jnp.maximum(indices, 0), axis=-1))
    others = jnp.where(put(jnp.zeros(x.shape, bool), places, ~none), -jnp.inf, x)
    peak, lowest = class_max(others, class_axis_name), jnp.finfo(x.dtype).min
    largest = jnp.maximum(jnp.maximum(peak, class_max(own, class_axis_name)), lowest)
    # limited, because the derivative with respect to T would multiply -inf by the 0 of its class
    below = jnp.maximum(others - jnp.maximum(peak, lowest), -1e5 * temperature)
    # in a row without other classes all weights are 0, and the logit of the rest is -inf
    weight = jnp.exp(below / temperature)
    total = class_sum(weight, class_axis_name)
    total = jnp.where(total == 0, 1, total)
    together = (peak - largest) + temperature * jnp.log(total)
    together, rest = (on_first(z, class_axis_name, -jnp.inf) for z in (together, rest))
    rows = jnp.concatenate([own - largest, together], -1), jnp.concatenate([values, rest], -1)
    value, gradient = divergence_and_gradient(*rows, *settings, class_axis_name=class_axis_name)
    of_rest = class_sum(gradient[..., -1:], class_axis_name)
    return value, put(weight * (of_rest / total), places, gradient[..., :-1])


_ROWS = {"kl": kl_divergence, "reverse_kl": reverse_kl_divergence, "jsd": jensen_shannon}
_TOPK = {
    "kl": rowwise(functools.partial(topk_and_gradient, kl_and_gradient)),
    "reverse_kl": rowwise(functools.partial(topk_and_gradient, reverse_kl_and_gradient)),
    "jsd": rowwise(functools.partial(topk_and_gradient, jsd_and_gradient)),
}
