"""Compares the logits of linear heads; only the logits of one block, of rows or of classes, are in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup

from kdtorch._collectives import all_max, all_sum, class_max, class_sum, on_first
from kdtorch._numerics import coupled, custom_op, dot, widest
from kdtorch._rowwise import by_rows

BLOCK = 2**24  # entries of the logits of a block of rows
PART = 2**22  # entries of a part of a head in half precision
LEAST = 2**21  # entries of the logits of a block of classes


class Output(NamedTuple):
    """How a head makes logits: z = scale (h · w + b), and with a cap c then c tanh(z / c). None leaves out a step."""

    scale: Tensor | None = None
    cap: float | None = None


class Student(NamedTuple):
    """What is trained: hidden states `[*batch, dim]`, a head `[classes, dim]` with its bias (empty if none), and T.

    The same fields also hold the gradients, or whether each gradient is needed.
    """

    hidden: Any
    weight: Any
    bias: Any
    temperature: Any


class Fixed(NamedTuple):
    """What is constant.

    Attributes:
        rows: the teacher's hidden states, or without a head what was recorded of its logits; each `[*batch, ...]`.
        weight: the weight of the teacher's head, or None.
        bias: the bias of the teacher's head, or None.
        where: which rows are kept.
        weights: factors of the rows' values, `[*batch]`.
        outputs: the student's and the teacher's.
        settings: the settings of the divergence, without T.
    """

    rows: tuple[Tensor, ...]
    weight: Tensor | None
    bias: Tensor | None
    where: Tensor | None
    weights: Tensor | None
    outputs: tuple[Output, Output]
    settings: tuple[Any, ...] = ()


# A divergence computed in blocks of classes. Its arguments are `over_classes`, which applies a step to one block after
# another, a tensor with the shape and dtype of the values, y, the settings and T. It returns the value of each row, and
# a function that returns a block's gradient with respect to x and, if T is trained, y · ∂y of each row.
ByClasses = Callable[..., tuple[Tensor, Callable[..., tuple[Tensor, Tensor | None]]]]


class Divergence(NamedTuple):
    """How rows of logits x are compared with y: the teacher's logits, or what was recorded of them.

    Attributes:
        by_rows: takes `(x, *y, *settings, T)` and returns the value of each row and its gradient with respect to x. The
            value must depend on x / T and y / T alone, so that its derivative with respect to T is
            -(x · ∂x + y · ∂y) / T.
        pull: takes the same arguments and returns y · ∂y of each row.
        by_classes: the same in blocks of classes, as `of_heads` and `of_kept` return it.
    """

    by_rows: Callable[..., tuple[Tensor, Tensor]]
    pull: Callable[..., Tensor]
    by_classes: ByClasses


def linear(name: str, divergence: Divergence) -> Callable[..., Tensor]:
    """Turn a divergence between logits into a function of the student's hidden states and head, and of constants.

    The function returns the sum over the kept rows, computes the gradients together with the sum, and stores nothing
    else. With `summed=False` it returns one value per row, and the backward pass computes gradients from the inputs.
    With a `class_group`, each rank has the rows of the heads for some of the classes.
    """

    def evaluate(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        temperature: Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        where: Tensor | None,
        weights: Tensor | None,
        scale: Tensor | None,
        teacher_scale: Tensor | None,
        cap: float | None,
        teacher_cap: float | None,
        class_group: str | None,
        setting: float | None,
        least: bool,
        above: Tensor | None,
        of_hidden: bool,
        of_weight: bool,
        of_bias: bool,
        of_temperature: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        student = Student(hidden, weight, bias, temperature)
        rows = tuple(x for x in (first, second, third) if x is not None)
        outputs = Output(scale, cap), Output(teacher_scale, teacher_cap)
        settings = () if setting is None else (setting,)
        fixed = Fixed(rows, teacher_weight, teacher_bias, where, weights, outputs, settings)
        asked = Student(of_hidden, of_weight, of_bias, of_temperature)
        group = None if class_group is None else _resolve_process_group(class_group)  # type: ignore[arg-type]  # a name
        return _evaluate(divergence, least, group, student, fixed, above, asked)

    evaluate.__name__ = evaluate.__qualname__ = name
    operator = custom_op(
        "(Tensor hidden, Tensor weight, Tensor bias, Tensor temperature, Tensor first, Tensor? second, Tensor? third, "
        "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? where, Tensor? weights, Tensor? scale, "
        "Tensor? teacher_scale, float? cap, float? teacher_cap, str? class_group, float? setting, bool least, Tensor? above, "
        "bool of_hidden, bool of_weight, bool of_bias, bool of_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _shapes,
    )(evaluate)
    evaluated = coupled(operator, learns=4, hands_over=True)

    def differentiable(
        student: Student, fixed: Fixed, summed: bool, least: bool, class_group: ProcessGroup | None
    ) -> Tensor:
        rows = (*fixed.rows, None, None)[:3]
        scales, caps = zip(*fixed.outputs, strict=True)
        setting = fixed.settings[0] if fixed.settings else None
        group = None if class_group is None else class_group.group_name
        others = fixed.weight, fixed.bias, fixed.where, fixed.weights, *scales, *caps, group, setting, least
        return evaluated(*student, *rows, *others, summed=summed)

    return differentiable


def _shapes(*given: Any) -> tuple[Tensor, ...]:
    student, asked, least, dtype = Student(*given[:4]), given[-4:], given[-6], widest(*_floats(*given[:2], *given[4:8]))
    gradients = _empty(student, asked, least, dtype)
    return student.hidden.new_empty(student.hidden.shape[:-1], dtype=dtype), *gradients


def _floats(*arrays: Tensor | None) -> Iterator[Tensor]:
    return (x for x in arrays if x is not None and x.is_floating_point())


def _empty(student: Student, asked: Any, least: bool, dtype: torch.dtype) -> Student:
    """Tensors for the gradients that are needed; what is written only once may be in the head's dtype."""
    written_once = least and student.weight.dtype == torch.bfloat16
    dtypes = dtype, student.weight.dtype if written_once else dtype, dtype, dtype
    return Student(
        *(
            x.new_empty(x.shape if wanted else 0, dtype=exact)
            for x, wanted, exact in zip(student, asked, dtypes, strict=True)
        )
    )


def _evaluate(
    divergence: Divergence,
    least: bool,
    class_group: ProcessGroup | None,
    student: Student,
    fixed: Fixed,
    above: Tensor | None,
    asked: Student,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted value of each row, and the gradients, where they are `asked` for, of the sum of these values.

    In that sum each value is multiplied by its entry of `above`, the gradient of the loss with respect to the value.
    """
    hidden = student.hidden
    dtype = widest(*_floats(hidden, student.weight, *fixed.rows, fixed.weight))
    kept, weights = fixed.where, fixed.weights
    if weights is not None:
        kept = weights != 0 if kept is None else kept & (weights != 0)
        weights = weights.to(dtype)
    factor = weights if above is None else above if weights is None else above * weights
    totals = _empty(student, asked, least, dtype)
    written = least and kept is None and hidden.numel() > 0  # every entry of a class is then written
    for x in (totals.hidden, totals.temperature) if written else totals:
        x.zero_()
    values = hidden.new_zeros(hidden.shape[:-1], dtype=dtype)
    places = None if kept is None else kept.flatten().nonzero().squeeze(-1)
    rows = [x.reshape(-1, *x.shape[hidden.ndim - 1 :]) for x in (hidden, *fixed.rows)]
    if fixed.weight is None:
        rows[1:] = (x.to(dtype) if x.is_floating_point() else x for x in rows[1:])
    flat = values.view(-1), totals._replace(hidden=totals.hidden.view(-1, hidden.shape[-1]))
    run = _by_classes if least else _by_rows
    factor = None if factor is None else factor.flatten()
    run(divergence, class_group, student, fixed, rows, places, factor, asked, *flat)
    if class_group is not None:  # the hidden states and T affect the logits of all ranks
        for x in (totals.hidden, totals.temperature):
            if x.numel():
                x.copy_(all_sum(x, class_group))
    return values if weights is None else values.mul_(torch.where(weights == 0, 0, weights)), *totals


def _by_rows(
    divergence: Divergence,
    class_group: ProcessGroup | None,
    student: Student,
    fixed: Fixed,
    rows: list[Tensor],
    places: Tensor | None,
    factor: Tensor | None,
    asked: Student,
    values: Tensor,
    totals: Student,
) -> None:
    dtype, number = values.dtype, len(values) if places is None else len(places)
    classes = len(student.weight)
    if class_group is not None:  # all ranks must use blocks of the same size
        classes = int(all_max(student.weight.new_tensor(classes, dtype=torch.int64), class_group))
    size = max(BLOCK // classes, 1)
    size = -(-number // max(-(-number // size), 1)) or 1  # blocks of nearly equal size
    settings = *fixed.settings, student.temperature
    output, other_output = fixed.outputs
    blocks = _slices(number, size) if places is None else places.split(size)
    for kept in blocks:
        h, *others = (x[kept] for x in rows)
        x, y = _logits(h, student.weight, student.bias, output, dtype), others
        if fixed.weight is not None:
            y = [_logits(others[0], fixed.weight, fixed.bias, other_output, dtype)]
        constants = class_group, divergence, asked.temperature
        values[kept], gradient, *pull = by_rows(_of_rows, None, x, *y, *settings, fixed=constants)
        of_row = None if factor is None else factor[kept]
        if of_row is not None:
            gradient.mul_(of_row.unsqueeze(-1))
        if pull:
            totals.temperature.sub_((pull[0] if of_row is None else pull[0] * of_row).sum() / student.temperature)
        del y
        gradient = _through(gradient, x, output)
        del x
        if asked.bias and student.bias.numel():
            totals.bias.add_(gradient.sum(0))
        if asked.weight:
            totals.weight.addmm_(gradient.T, h.to(dtype))
        if asked.hidden:
            totals.hidden[kept] = _product(gradient, student.weight)


def _of_rows(
    class_group: ProcessGroup | None, divergence: Divergence, learns_temperature: bool, x: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """The value of each row, its gradient by x, and if T learns x · ∂x + y · ∂y."""
    value, gradient = divergence.by_rows(x, *others, class_group=class_group)
    if not learns_temperature:
        return value, gradient
    return value, gradient, dot(gradient, x) + divergence.pull(x, *others, class_group=class_group)


def _by_classes(
    divergence: Divergence,
    class_group: ProcessGroup | None,
    student: Student,
    fixed: Fixed,
    rows: list[Tensor],
    places: Tensor | None,
    factor: Tensor | None,
    asked: Student,
    values: Tensor,
    totals: Student,
) -> None:
    """Compute in blocks of classes: first the sums over all classes of each row, then the gradients."""
    kept = slice(None) if places is None else places
    h, *others = (x[kept] for x in rows)
    if not len(h):
        return
    dtype, (classes, dim) = values.dtype, student.weight.shape
    size = min(classes, max(LEAST // max(len(h), dim), 16))
    wide = h.to(dtype)

    def over_classes(step: Callable[..., Any], sums: Any) -> Any:
        """Call `step(sums, part, *logits)` for one block of classes after another."""
        for part in _slices(classes, size):
            logits = [_logits(wide, student.weight[part], student.bias[part], fixed.outputs[0], dtype)]
            if fixed.weight is not None:
                bias = None if fixed.bias is None else fixed.bias[part]
                logits.append(_logits(others[0], fixed.weight[part], bias, fixed.outputs[1], dtype))
            sums = step(sums, part, *logits)
        return sums

    def add(pulled: Tensor | None, part: slice, *logits: Tensor) -> Tensor | None:
        gradient, pull = gradient_of(part, *logits, asked.temperature)
        if factor is not None:
            gradient.mul_(factor[kept].unsqueeze(-1))
            pull = pull if pull is None else pull * factor[kept]
        if pull is not None:
            totals.temperature.sub_((dot(gradient, logits[0]) + pull).sum() / student.temperature)
        gradient = _through(gradient, logits[0], fixed.outputs[0])
        if asked.bias and student.bias.numel():
            totals.bias[part] = gradient.sum(0)
        if asked.weight:
            if totals.weight.dtype == dtype:
                torch.mm(gradient.T, wide, out=totals.weight[part])
            else:
                totals.weight[part] = gradient.T @ wide
        if pulled is not None:
            pulled.addmm_(gradient, student.weight[part].to(dtype))
        return pulled

    known = others if fixed.weight is None else []
    given = *known, *fixed.settings, student.temperature
    start = h.new_empty(len(h), dtype=dtype)
    values[kept], gradient_of = divergence.by_classes(over_classes, start, *given, class_group=class_group)
    if any(asked):
        pulled = over_classes(add, h.new_zeros(h.shape, dtype=dtype) if asked.hidden else None)
        if asked.hidden:
            totals.hidden[kept] = pulled


class Sums(NamedTuple):
    """For each row, over the classes so far: the largest logit, Σ w with w = exp((logit - largest) / T), and Σ w d.

    d is x - y, after the largest logit of each has been subtracted.
    """

    peak: Tensor
    total: Tensor
    apart: Tensor


def of_heads(
    f: Callable[..., Tensor],
    g: Callable[..., Tensor],
    means: Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]] | None = None,
) -> ByClasses:
    """`by_classes` of a divergence E_p[f] + E_q[g], where p = softmax(x / T) and q = softmax(y / T).

    The function `f(log p, log q, *settings)` returns p f of each class, and the function `g` returns q g. The gradients
    with respect to x and y must be p (f - E_p[f]) / T and q (g - E_q[g]) / T. If `means` is given, it computes E_p[f]
    and E_q[g] from E_p[r] and E_q[r], r = log(p / q), and returns None for a mean that is 0; then one pass over the
    classes precedes the gradients. Without `means` there are two.
    """

    def by_classes(
        over_classes: Callable[..., Any], rows: Tensor, *settings: Any, class_group: ProcessGroup | None
    ) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor | None]]]:
        *others, temperature = settings
        least, zero = torch.full_like(rows, torch.finfo(rows.dtype).min), torch.zeros_like(rows)

        def moved(sums: tuple[Sums, Sums], peaks: list[Tensor]) -> list[Sums]:
            """The same sums with respect to other largest logits."""
            step = (sums[0].peak - sums[1].peak) - (peaks[0] - peaks[1])  # the change of all d
            new = []
            for old, peak in zip(sums, peaks, strict=True):
                decay = ((old.peak - peak) / temperature).exp()
                apart = torch.where(decay == 0, 0, decay * (old.apart + step * old.total))
                new.append(Sums(peak, decay * old.total, apart))
            return new

        def gather(sums: tuple[Sums, Sums], part: slice, x: Tensor, y: Tensor) -> tuple[Sums, Sums]:
            peaks = [torch.maximum(old.peak, z.amax(-1)) for old, z in zip(sums, (x, y), strict=True)]
            x, y = (z.sub_(peak.unsqueeze(-1)) for z, peak in zip((x, y), peaks, strict=True))
            d = x - y if means is not None else None
            new = []
            for old, z in zip(moved(sums, peaks), (x, y), strict=True):
                weight = z.div_(temperature).exp_()
                apart = old.apart if d is None else old.apart + dot(weight, d)
                new.append(Sums(old.peak, old.total + weight.sum(-1), apart))
            return new[0], new[1]

        ours, theirs = over_classes(gather, (Sums(least, zero, zero), Sums(least, zero, zero)))
        if class_group is not None:
            each = moved((ours, theirs), [all_max(one.peak, class_group) for one in (ours, theirs)])
            ours, theirs = (Sums(x.peak, *(all_sum(z, class_group) for z in x[1:])) for x in each)
        logs = ours.total.log(), theirs.total.log()

        def log_softmaxes(*logits: Tensor) -> Iterator[Tensor]:
            for z, one, log in zip(logits, (ours, theirs), logs, strict=True):
                yield (z - one.peak.unsqueeze(-1)).div_(temperature).sub_(log.unsqueeze(-1))

        mean: Any
        if means is not None:
            mean = means(*(one.apart / one.total / temperature - (logs[0] - logs[1]) for one in (ours, theirs)))
        else:

            def add(sums: tuple[Tensor, Tensor], part: slice, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
                both = *log_softmaxes(x, y), *others
                return sums[0] + f(*both).sum(-1), sums[1] + g(*both).sum(-1)

            mean = tuple(all_sum(x, class_group) for x in over_classes(add, (zero, zero)))
        value = sum(m for m in mean if m is not None)

        def centred(of: Callable[..., Tensor], log: Tensor, mean: Tensor | None, both: tuple[Any, ...]) -> Tensor:
            result = of(*both)
            if mean is not None:  # it is infinite if only one of the two has a class at -inf; gradients stay finite
                result.sub_(log.exp().mul_(torch.where(mean.isfinite(), mean, 0).unsqueeze(-1)))
            return result.div_(temperature)

        def gradient(part: slice, x: Tensor, y: Tensor, learns_temperature: bool) -> tuple[Tensor, Tensor | None]:
            log_p, log_q = log_softmaxes(x, y)
            both = log_p, log_q, *others
            pull = dot(centred(g, log_q, mean[1], both), y) if learns_temperature else None
            return centred(f, log_p, mean[0], both), pull

        return value.clamp(min=0), gradient

    return by_classes


def of_kept(
    divergence_and_gradient: Callable[..., tuple[Tensor, Tensor]], of_teacher: Callable[..., Tensor], bucket: bool
) -> ByClasses:
    """`by_classes` of a divergence over the kept classes and, with `bucket`, one class for the rest.

    y is `values, indices, rest`; an index below 0 stands for no class. `of_teacher` is the gradient with respect to y.
    """

    def by_classes(
        over_classes: Callable[..., Any],
        rows: Tensor,
        values: Tensor,
        indices: Tensor,
        rest: Tensor,
        *settings: Any,
        class_group: ProcessGroup | None,
    ) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor | None]]]:
        temperature = settings[-1]
        lowest = torch.finfo(rows.dtype).min

        def places(part: slice) -> tuple[Tensor, Tensor]:
            """Which of the kept classes are in a block, and their positions in it."""
            inside = (indices >= part.start) & (indices < part.stop)
            return inside, torch.where(inside, indices - part.start, 0)

        def without(x: Tensor, inside: Tensor, at: Tensor) -> Tensor:
            return x.scatter_add_(-1, at, torch.where(inside, -math.inf, 0.0).to(x.dtype))

        def gather(sums: tuple[Tensor, Tensor, Tensor], part: slice, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            own, peak, total = sums
            inside, at = places(part)
            own = torch.where(inside, x.gather(-1, at), own)
            others = without(x, inside, at)
            new = torch.maximum(peak, others.amax(-1))
            weight = others.sub_(new.unsqueeze(-1)).div_(temperature).exp_()
            return own, new, ((peak - new) / temperature).exp() * total + weight.sum(-1)

        start = torch.full_like(values, -math.inf), torch.full_like(rows, lowest), torch.zeros_like(rows)
        own, local_peak, total = over_classes(gather, start)
        peak = all_max(local_peak, class_group)
        largest = class_max(own, class_group).squeeze(-1).clamp(min=lowest)
        if bucket:
            largest = torch.maximum(largest, peak)
            total = all_sum(((local_peak - peak) / temperature).exp() * total, class_group)
            total = torch.where(total == 0, 1, total)
            others = torch.where(peak == lowest, -math.inf, peak - largest) + temperature * total.log()
            others, rest = (on_first(z, class_group, -math.inf) for z in (others.unsqueeze(-1), rest))
        # the largest is subtracted from each, because the logits of one may be far from those of the other
        student, teacher = own - largest.unsqueeze(-1), values
        if bucket:
            student, teacher = torch.cat([student, others], -1), torch.cat([values, rest], -1)
        teacher = teacher - class_max(teacher, class_group).clamp(min=lowest)
        value, slope = divergence_and_gradient(student, teacher, *settings, class_group=class_group)
        of_rest = class_sum(slope[:, -1:], class_group)

        def gradient(part: slice, x: Tensor, learns_temperature: bool) -> tuple[Tensor, Tensor | None]:
            pull = None
            if learns_temperature:
                pull = rows.new_zeros(len(x))
                if part.start == 0:  # in the first block only, because it is the sum over all classes
                    pull = dot(of_teacher(student, teacher, *settings, class_group=class_group), teacher)
            inside, at = places(part)
            if bucket:
                spread = without(x.clone(), inside, at).sub_(peak.unsqueeze(-1)).div_(temperature).exp_()
                spread = spread.mul_(of_rest / total.unsqueeze(-1))
            else:
                spread = torch.zeros_like(x)
            return spread.scatter_add_(-1, at, torch.where(inside, slope[:, : values.shape[-1]], 0)), pull

        return value, gradient

    return by_classes


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, output: Output, dtype: torch.dtype) -> Tensor:
    """The logits of hidden states, computed in `dtype` without a copy of the whole head in that dtype."""
    hidden = hidden.to(dtype)
    if weight.dtype == dtype:
        logits = hidden @ weight.T
    else:
        logits = torch.cat([hidden @ weight[part].to(dtype).T for part in _parts(weight)], -1)
    if bias is not None and not bias.numel():
        bias = None
    if bias is not None:
        logits.add_(bias)
    if output.scale is not None:
        logits.mul_(output.scale)
    if output.cap is not None:
        logits.div_(output.cap).tanh_().mul_(output.cap)
        if bias is not None:
            logits.masked_fill_(bias.isneginf(), -math.inf)
    return logits


def _through(gradient: Tensor, logits: Tensor, output: Output) -> Tensor:
    """The gradient with respect to h · w + b, given the gradient with respect to the logits."""
    if output.cap is not None:  # a class at -inf has a gradient of 0
        gradient = gradient * (1 - (logits.clamp(min=-output.cap) / output.cap).square_())
    return gradient if output.scale is None else output.scale * gradient


def _product(gradient: Tensor, weight: Tensor) -> Tensor:
    """The matrix product of gradient and weight, in the gradient's dtype."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    product = gradient.new_zeros(len(gradient), weight.shape[-1])
    for part in _parts(weight):
        product.addmm_(gradient[:, part], weight[part].to(gradient.dtype))
    return product


def _parts(weight: Tensor) -> Iterator[slice]:
    return _slices(len(weight), max(PART // weight.shape[-1], 1))


def _slices(number: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, number)) for first in range(0, number, size))
