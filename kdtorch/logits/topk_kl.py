"""Knowledge distillation from the teacher's largest logits alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdtorch._collectives import class_max, class_sum, on_first
from kdtorch._numerics import check_classes, fraction, kl_and_gradient, positive, times_square, valid_index
from kdtorch._reduce import reduce, zero_masked
from kdtorch._rowwise import kl_divergence, rowwise
from kdtorch._typing import Bool, Float, Integer, ProcessGroup, Reduction, Scalar, checked, describe
from kdtorch.logits.jsd import jensen_shannon, jsd_and_gradient
from kdtorch.logits.reverse_kl import reverse_kl_and_gradient, reverse_kl_divergence


@checked(dtensor="any")
def topk_kl_loss(
    student_logits: Float[Tensor, "*batch classes"],
    values: Float[Tensor, "*batch kept"],
    indices: Integer[Tensor, "*batch kept"],
    rest: Float[Tensor, "*batch"] | Mapping[str, Float[Tensor, "*batch"]] | None = None,
    *,
    temperature: Scalar = 1.0,
    tail: Literal["bucket", "renormalize"] = "bucket",
    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl",
    beta: float = 0.5,
    kept: Bool[Tensor, "*batch kept"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
    class_group: ProcessGroup | None = None,
) -> Tensor:
    r"""KL divergence to a teacher of which k logits per example are kept; all others count as one class, or are left out.

    $$T^2\,\mathrm{KL}(q\,\|\,p),\qquad p=\mathrm{softmax}\big((s_K, \bar s)/T\big),\quad
    q=\mathrm{softmax}\big((t_K, \bar t)/T\big),\qquad \bar x=T\log\sum_{c\notin K}e^{x_c/T}$$

    over the k kept classes K and, with `tail="bucket"`, one more for the rest, which `tail="renormalize"` leaves out.
    `divergence` compares p and q otherwise.

    Args:
        student_logits: `[*batch, classes]`.
        values: `[*batch, kept]`, the teacher's logits of the kept classes, or their logarithms of probabilities at
            temperature 1, with `rest` shifted by the same number; constant.
        indices: `[*batch, kept]`, the classes; one outside `0 .. classes - 1` is an error. A class that an example has
            twice makes it NaN.
        rest: `[*batch]`, t̄, the logit of all other classes together at the temperature of the call, which cannot be
            computed from its value at another temperature. `record_teacher` keeps it for each of its `temperatures`,
            and `TeacherCache.read` returns it with its temperature, as in `{"4.0": rest}`; a call at another
            temperature is then an error, or NaN if `temperature` is a tensor. If `rest` is a tensor alone, its
            temperature cannot be checked. The bucket needs `rest`, unless all classes are kept; it is -inf where
            nothing is left. It is constant, also where the temperature is learned.
        temperature: T > 0; a tensor has a gradient.
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
        group: the process group that the batch is spread over.
        class_group: the process group that the classes are spread over.

    Returns:
        A scalar, or `[*batch]` with `reduction="none"`. It is 0 where the two distributions agree, never negative, inf
        where the divergence is (KL(q‖p) where the student gives -inf to a class that the teacher uses), and NaN where
        everything that is compared of one of them is -inf.

    Raises:
        ValueError: a temperature that is not positive, an unknown tail, divergence or reduction, a β outside 0 to 1,
            fewer than 2 classes, more classes kept than there are, no `rest` for the bucket, or one of another
            temperature.
        IndexError: a class outside `0 .. classes - 1`.
        TypeError: a shape or dtype that does not fit.

    Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, https://arxiv.org/abs/1503.02531, on a
    part of the classes. The mass of the rest is computed as a log-sum-exp over the student's other logits. One minus
    the sum of the kept probabilities would lose all precision where that sum is close to 1.

    >>> import torch
    >>> from kdtorch import topk_kl_loss
    >>> s, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    >>> kept, rest = torch.tensor([[1, 0]]), torch.tensor([-1.0])
    >>> print(f"{topk_kl_loss(s, t, kept, rest):.4f}")
    0.4112
    """
    first, classes = check_classes(student_logits, class_group, group)
    shard = None if class_group is None else (first, student_logits.shape[-1])
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
    over = {"where": where, "class_group": class_group}
    if tail == "renormalize":
        own = _Entries.apply(student_logits, indices.clone())  # the user may change the original
        value = _ROWS[compared](own, values, *settings, **over)
    else:
        value = _TOPK[compared](student_logits, values, indices, left, *settings, **over)
    return reduce(value if divergence == "jsd" else times_square(temperature, value), where, reduction, group)


class Recorded(NamedTuple):
    """A teacher's kept classes, checked. An index below 0 is no class; `rest` is `[*batch, 1]`; T ends the settings."""

    divergence: str
    values: Tensor
    indices: Tensor
    rest: Tensor
    settings: tuple[Scalar, ...]


def recorded(
    loss: str,
    classes: int | Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor | Mapping[str, Tensor] | None,
    temperature: Scalar,
    tail: str,
    divergence: str,
    beta: float,
    kept: Tensor | None,
    where: Tensor | None,
    shard: tuple[int | Tensor, int] | None = None,
) -> Recorded:
    """What a student's logits are compared with; NaN for an example whose values cannot be used.

    `classes` is the number of classes on all ranks. `shard` is the first class and the number of classes on this rank;
    classes of other ranks become padding.
    """
    entries, known = indices.shape[-1], not isinstance(classes, Tensor)  # a compiler does not know other ranks' classes
    if tail not in ("bucket", "renormalize"):
        raise ValueError(f'`tail` must be one of "bucket", "renormalize", got {tail!r}')
    if divergence not in ("kl", "reverse_kl", "jsd"):
        raise ValueError(f'`divergence` must be one of "kl", "reverse_kl", "jsd", got {divergence!r}')
    if entries < 1 or (kept is None and known and entries > classes):
        raise ValueError(
            f"`indices` must hold from 1 to {classes} classes an example, as many as there are, got {entries}"
        )
    if tail == "bucket" and rest is None and (kept is not None or not known or entries < classes):
        raise ValueError(
            f'`rest` must be given with tail="bucket" where {entries} of {classes if known else "all"} classes are kept, got None; '
            'leave the rest out by tail="renormalize"'
        )
    weight = fraction("beta", beta, values)
    ends = "kl" if weight == 0 else "reverse_kl" if weight == 1 else divergence
    compared = ends if divergence == "jsd" else divergence
    indices, values = zero_masked(where, indices, values)
    indices = valid_index("indices", indices if kept is None else torch.where(kept, indices, 0), classes)
    if kept is not None:
        indices, values = torch.where(kept, indices, -1), torch.where(kept, values, -math.inf)
    places = indices.sort(-1).values
    twice = ((places.diff(dim=-1) == 0) & (places[..., 1:] >= 0)).any(-1, keepdim=True)
    if shard is not None:
        indices = indices - shard[0]
        own = (indices >= 0) & (indices < shard[1])
        indices, values = torch.where(own, indices, -1), torch.where(own, values, -math.inf)
    left = torch.full_like(values[..., 0], -math.inf) if rest is None else _rest_at(loss, rest, temperature, values)
    values = torch.where(twice | left.isnan().unsqueeze(-1), math.nan, values)
    settings = (weight, temperature) if compared == "jsd" else (temperature,)
    return Recorded(compared, values, indices, left.unsqueeze(-1), settings)


def _rest_at(loss: str, rest: Tensor | Mapping[str, Tensor], temperature: Scalar, values: Tensor) -> Tensor:
    """The logit of the rest at the temperature of the call, which must be one that it was recorded for."""
    given = {f'rest["{name}"]': x for name, x in rest.items()} if isinstance(rest, Mapping) else {"rest": rest}
    for name, x in given.items():
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape == values.shape[:-1]):
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
    if isinstance(temperature, Tensor):  # its value cannot be read
        found = torch.full_like(values[..., 0], math.nan)
        for one, x in recorded.items():
            found = torch.where(temperature.float() == one, x, found)
        return found
    if temperature not in recorded:
        raise ValueError(
            f"`rest` was recorded for the temperatures {sorted(recorded)}, got `temperature` {temperature}; read it for "
            'that one, or give no rest, with tail="renormalize"'
        )
    return recorded[temperature]


class _Entries(torch.autograd.Function):
    """`x[..., indices]`, -inf where an index is below 0. `Tensor.gather` would store x until the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, indices: Tensor) -> Tensor:
        return torch.where(indices < 0, -math.inf, x.gather(-1, indices.clamp(min=0)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, indices = inputs
        ctx.save_for_backward(indices)
        ctx.classes = x.shape[-1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        entries = torch.where(indices < 0, 0, cotangent)
        zeros = cotangent.new_zeros(()).expand(*cotangent.shape[:-1], ctx.classes)
        return zeros.scatter_add(-1, indices.clamp(min=0), entries), None


def topk_and_gradient(
    divergence_and_gradient: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor,
    *settings: Scalar,
    class_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """A divergence over the classes of `indices` and one class for the rest, and its gradient over all classes.

    An index below 0 stands for no class; `rest` is `[*batch, 1]`. The gradient is written by hand: nothing else is
    stored, and it shares weights with the value. With classes spread over ranks, each rank compares its own classes,
    and the first rank also compares the rest.
    """
    temperature = settings[-1]
    student, places, weight, total = kept_and_rest(x, indices, temperature, class_group)
    teacher = torch.cat([values, on_first(rest, class_group, -math.inf)], -1)
    value, gradient = divergence_and_gradient(student, teacher, *settings, class_group=class_group)
    spread = weight * (class_sum(gradient[..., -1:], class_group) / total)
    return value, spread.scatter_add_(-1, places, torch.where(indices < 0, 0.0, gradient[..., :-1]))


def kept_and_rest(
    x: Tensor, indices: Tensor, temperature: Scalar, class_group: ProcessGroup | None = None
) -> tuple[Tensor, ...]:
    """The logits of the kept classes and of the rest, minus the largest; the positions of the kept classes; the weights
    of the other classes; and the sum of these weights."""
    none, places = indices < 0, indices.clamp(min=0)
    own = torch.where(none, -math.inf, x.gather(-1, places))
    others = x.scatter_add(-1, places, torch.where(none, 0.0, -math.inf).to(x.dtype))
    peak, lowest = class_max(others, class_group), torch.finfo(x.dtype).min
    largest = torch.maximum(peak, class_max(own, class_group)).clamp(min=lowest)
    below = others.sub_(peak.clamp(min=lowest))
    if isinstance(temperature, Tensor):  # its derivative would multiply -inf by the 0 of its class
        below = torch.maximum(below, -1e5 * temperature)
    # in a row without other classes all weights are 0, and the logit of the rest is -inf
    weight = (below * (math.log2(math.e) / temperature)).exp2_()
    total = class_sum(weight, class_group).clamp(min=1)
    together = on_first((peak - largest) + temperature * total.log(), class_group, -math.inf)
    return torch.cat([own - largest, together], -1), places, weight, total


_ROWS = {"kl": kl_divergence, "reverse_kl": reverse_kl_divergence, "jsd": jensen_shannon}
_TOPK = {
    "kl": rowwise(functools.partial(topk_and_gradient, kl_and_gradient)),
    "reverse_kl": rowwise(functools.partial(topk_and_gradient, reverse_kl_and_gradient)),
    "jsd": rowwise(functools.partial(topk_and_gradient, jsd_and_gradient)),
}
