"""The numerical care that several losses share."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from kdtorch._collectives import class_max, class_range, class_sum
from kdtorch._typing import ProcessGroup, Scalar, rounds, sizes


def widest(*arrays: Tensor) -> torch.dtype:
    """What they are computed in: float64 if one of them is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in arrays) else torch.float32


def promote(*arrays: Tensor) -> tuple[Tensor, ...]:
    """All in float64 if one of them is, else in float32."""
    dtype = widest(*arrays)
    return tuple(x.to(dtype) for x in arrays)


def positive(name: str, value: Scalar, *like: Tensor, constant: bool = False) -> Scalar:
    """`value` if it is finite and above 0; an array is not asked, which would wait for it, so a bad one becomes NaN.

    It has a gradient, unless it is `constant`, as all other numbers are.
    """
    return _number(name, value, like, "finite and greater than 0", lambda x: (x > 0) & (x < math.inf), constant)


def non_negative(name: str, value: Scalar, *like: Tensor) -> Scalar:
    return _number(name, value, like, "finite and at least 0", lambda x: (x >= 0) & (x < math.inf))


def fraction(name: str, value: Scalar, *like: Tensor) -> Scalar:
    return _number(name, value, like, "between 0 and 1", lambda x: (x >= 0) & (x <= 1))


def finite(name: str, value: float) -> float:
    """A number that chooses how a loss is computed, and is no array."""
    if not abs(value) < math.inf:
        raise ValueError(f"`{name}` must be finite, got {value}")
    return float(value)


def _number(
    name: str,
    value: Scalar,
    like: tuple[Tensor, ...],
    expected: str,
    test: Callable[[Any], Any],
    constant: bool = True,
) -> Scalar:
    if isinstance(value, Tensor):
        value = value.to(like[0].device, widest(*like))
        value = value.detach() if constant else value
        return value + torch.where(test(value.detach()), 0.0, math.nan)
    if not test(value):
        raise ValueError(f"`{name}` must be {expected}, got {value}")
    return float(value)


def scalar(value: Scalar, *like: Tensor) -> Tensor:
    """A number as a tensor, in the dtype that the others are computed in."""
    return value if isinstance(value, Tensor) else like[0].new_full((), value, dtype=widest(*like))


def check_state(state: Any) -> None:
    for name, x in zip(state._fields, state, strict=True):
        if x.dtype.itemsize < 4:
            raise ValueError(
                f"`state.{name}` must be float32 or float64, got {str(x.dtype).removeprefix('torch.')}; in half precision small steps are lost; leave the state in float32"
            )


def times_square(temperature: Scalar, value: Tensor) -> Tensor:
    """T² value."""
    return value if _is_one(temperature) else temperature**2 * value


def _is_one(temperature: Scalar) -> bool:
    """Whether T, which then need not be multiplied by, is the number 1; an array is not asked."""
    return isinstance(temperature, float) and temperature == 1


def weigh(weight: Scalar, value: Tensor) -> Tensor:
    """weight × value. What weighs 0 is not there, be it infinite."""
    return torch.where((weight == 0) & value.isinf(), 0, weight * value)


def check_classes(
    logits: Tensor, class_group: ProcessGroup | None = None, group: ProcessGroup | None = None
) -> tuple[int | Tensor, int | Tensor]:
    """The first class of this rank, and the number of classes on all ranks, which is at least 2."""
    first, classes = class_range(logits, logits.shape[-1], class_group, group)
    if not isinstance(classes, Tensor) and classes < 2:
        raise ValueError(f"the logits must have at least 2 classes on the last axis, got shape {sizes(logits)}")
    return first, classes


def custom_op(schema: str, shapes: Callable[..., Any]) -> Callable[[Callable], Callable]:
    """Make an operator of a function whose course depends on the values, so that `torch.compile` and `vmap` take it whole.

    `shapes` makes empty results of the right shape; `vmap` calls the function once an example. The operator has no
    gradient of its own.
    """

    def decorate(function: Callable) -> Callable:
        name = function.__module__.rpartition(".")[2] + function.__name__
        definition = torch.library.custom_op(f"kdlosses::{name}", function, mutates_args=(), schema=schema)
        definition.register_fake(shapes)
        operator = getattr(torch.ops.kdlosses, name).default

        def each(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
            def example(i: int) -> Any:
                return operator(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))

            results = [example(i) for i in range(info.batch_size)]
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

        definition.register_vmap(each)
        return operator

    return decorate


@custom_op("(Tensor x) -> Tensor", torch.empty_like)
def _copy(x: Tensor) -> Tensor:
    return x.clone()


def own(x: Tensor) -> Tensor:
    """A copy of what a user may write into before the backward pass, or has made under `torch.inference_mode`.

    As an operator it is what a compiler holds, which would hold the original for a clone.
    """
    return _copy(x) if torch.compiler.is_compiling() else x.clone()


def _inside(index: Tensor, size: int | Tensor, name: str) -> Tensor:
    index = index.long()  # a narrow integer may not hold the size
    wrong = (index < 0) | (index >= size)
    if index.device.type == "cpu" and wrong.any():  # elsewhere the kernels themselves raise, without a wait here
        raise IndexError(
            f"`{name}` must be in 0 .. {size - 1}, got {index[wrong][0].item()}; mask those without one with `where`"
        )
    return index


@custom_op(
    "(Tensor index, int size, str name) -> Tensor", lambda index, size, name: torch.empty_like(index, dtype=torch.int64)
)
def _in_range(index: Tensor, size: int, name: str) -> Tensor:
    return _inside(index, size, name).clone()


@custom_op(
    "(Tensor index, Tensor size, str name) -> Tensor",
    lambda index, size, name: torch.empty_like(index, dtype=torch.int64),
)
def _in_range_of_ranks(index: Tensor, size: Tensor, name: str) -> Tensor:
    return _inside(index, size, name).clone()


def valid_index(name: str, index: Tensor, size: int | Tensor) -> Tensor:
    """The index as int64; an error that names it if it is out of range. A size that ranks tell each other may be a tensor."""
    if isinstance(size, Tensor):
        return _in_range_of_ranks(index, size, name)
    if not torch.compiler.is_compiling():
        try:
            return _inside(index, size, name)
        except RuntimeError:  # in vmap, which lets nobody ask for a value but an operator
            pass
    return _in_range(index, size, name)


def without_class(x: Tensor, labels: Tensor, absent: float = -math.inf) -> Tensor:
    """The logits with -inf at each example's label."""
    return x.scatter(-1, labels.unsqueeze(-1), absent)


class Softmax(NamedTuple):
    """p = softmax(x / T), the largest entry of x, and log sum exp((x - largest) / T)."""

    p: Tensor
    peak: Tensor
    log_total: Tensor


def softmax(
    x: Tensor, temperature: Scalar = 1.0, may_be_empty: bool = False, class_group: ProcessGroup | None = None
) -> Softmax:
    """Over the last axis, which may be spread over ranks. A row of -inf throughout is no distribution: it gives NaN, or p = 0 if it `may_be_empty`.

    The largest entry is taken off before the division, whose rounding would be that of the largest.
    """
    peak = class_max(x, class_group)
    if may_be_empty:
        peak = peak.clamp(min=torch.finfo(x.dtype).min)
    below = x - peak
    if isinstance(temperature, Tensor):  # in whose derivative infinity would meet the 0 of an excluded class
        below = torch.maximum(below, -1e5 * temperature)
    # on a CPU a power of 2 takes PyTorch a quarter of the time of one of e
    weight = (below * (math.log2(math.e) / temperature)).exp2_()
    total = class_sum(weight, class_group)
    if may_be_empty:
        total = total.clamp(min=1)  # as much is the largest entry's, where there is one
    return Softmax(weight / total, peak, total.log())


def dot(q: Tensor, x: Tensor) -> Tensor:
    """sum q x over the last axis, where 0 times infinity is 0. NaN may be 0 too, and must be felt elsewhere."""
    if not eager_on_cpu(q, x):
        return torch.where(q == 0, 0, q * x).sum(-1)
    result = torch.linalg.vecdot(q, x)
    if not result.isfinite().all():  # on a CPU `torch.where` takes ten times as long
        result = (q * x).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).sum(-1)
    return result


def eager_on_cpu(*arrays: Tensor | float) -> bool:
    """Whether values may be asked, and no derivative is to be traced: of ordinary tensors on a CPU, in eager PyTorch.

    There one kernel follows another, so that few and large ones are fast, where a compiler fuses what it is given.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    traced = torch.is_grad_enabled()
    for x in arrays:
        if isinstance(x, Tensor) and (
            type(x) not in (Tensor, Parameter) or not x.is_cpu or (traced and x.requires_grad)
        ):
            return False
    return True


class _Refused(torch.autograd.Function):
    """A value whose derivative with respect to the inputs is not written down, so that it is refused and not 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *inputs: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        raise NotImplementedError("this loss of kdtorch has no second derivative; kdjax has it")


BLOCK = 2**17  # entries that are handled at once on a CPU, whose caches then hold all that is made of them


def with_gradients(
    evaluate: Callable[..., tuple[Tensor, ...]], learns: int, hands_over: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """A differentiable function from one that makes its value and its gradients in one go.

    `evaluate(*inputs, *asked)` returns the value, the gradient with respect to each of the first `learns` inputs, and
    what else there is to return, which is constant; gradients that are not `asked` for may be empty. A gradient has the
    axes of its input, which begin with the value's; the gradient with respect to a scalar has the value's axes. The
    gradients, in the dtypes of their inputs, are all that is held until the backward pass. Nothing of the inputs is
    held, so they may be written into. A second derivative is an error. A loss whose gradients may be
    most of the memory of a step sets `hands_over`: the last backward pass then returns the stored gradients themselves,
    and copies nothing.
    """

    class WithGradients(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(asked: tuple[bool, ...], *given: Any) -> tuple[Tensor, ...]:
            inputs = given[sum(asked) :]
            value, *others = evaluate(*inputs, *asked)
            learned = zip(others, inputs, asked, strict=False)
            held = (pack(g, x.dtype, g.ndim - value.ndim) for g, x, wanted in learned if wanted)
            return value, *others[learns:], *itertools.chain(*held)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            asked, *given = inputs
            edges, learned = given[: sum(asked)], given[sum(asked) :][:learns]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*edges, *output[len(output) - _parts(learned, asked) :])
            ctx.asked, ctx.constants = asked, len(given) - len(edges) - learns
            ctx.learned = [(x.dtype, x.ndim == 0 < output[0].ndim) for x in learned]

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            number = sum(ctx.asked)
            edges, parts = ctx.saved_tensors[:number], iter(ctx.saved_tensors[number:])
            last = hands_over and not torch.is_grad_enabled() and _eager(cotangent)
            last = last and not torch._C._autograd._get_current_graph_task_keep_graph()
            results: list[Tensor | None] = []
            for (dtype, summed), wanted in zip(ctx.learned, ctx.asked, strict=True):
                if not wanted or cotangent is None:
                    results.append(None)
                    continue
                if last:
                    gradient = next(parts)
                    results.append(_scale(gradient, cotangent * next(parts) if dtype == torch.float16 else cotangent))
                    continue
                gradient = next(parts).to(cotangent.dtype)
                if dtype == torch.float16:
                    gradient = gradient * next(parts)
                if torch.is_grad_enabled():
                    gradient = _Refused.apply(gradient, *edges)
                gradient = cotangent.reshape(cotangent.shape + (1,) * (gradient.ndim - cotangent.ndim)) * gradient
                results.append((gradient.sum() if summed else gradient).to(dtype))
            return None, *(None for _ in edges), *results, *(None for _ in range(ctx.constants))

    def differentiable(*inputs: Any) -> tuple[Tensor, ...]:
        learned = inputs[:learns]
        asked = tuple(map(may_learn, learned))
        with no_autocast(inputs[0]):
            if not any(asked):
                value, *others = evaluate(*inputs, *asked)
                return value, *others[learns:]
            # of no entries: they hold nothing, and the second derivative is refused of them
            edges = (x.flatten()[:0].clone() for x, wanted in zip(learned, asked, strict=True) if wanted)
            results = WithGradients.apply(asked, *edges, *learned, *map(_constant, inputs[learns:]))
            return results[: len(results) - _parts(learned, asked)]

    return differentiable


def _eager(x: Tensor | None) -> bool:
    """Whether x is an ordinary tensor, and no compiler and no transform of torch.func is at work."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and type(x) is Tensor


def _scale(x: Tensor, factor: Tensor) -> Tensor:
    """x times a number, in place; in half precision a part at a time, as the number has more digits."""
    if x.dtype == factor.dtype:
        return x.mul_(factor)
    for part in x.view(-1).split(2**20):
        part.copy_(part.to(factor.dtype).mul_(factor.flatten()))
    return x


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _parts(learned: Sequence[Tensor], asked: tuple[bool, ...]) -> int:
    """How many tensors hold the gradients."""
    return sum(2 if x.dtype == torch.float16 else 1 for x, wanted in zip(learned, asked, strict=True) if wanted)


def pack(gradient: Tensor, dtype: torch.dtype, axes: int) -> tuple[Tensor, ...]:
    """A gradient in another dtype; in float16, whose range is small, as multiples of a number for each row of so many axes.

    Users of float16 multiply the loss, so that its gradient does not vanish, in the backward pass, which is later. A
    number that is not finite is left as it is, and the others of its row too.
    """
    if dtype != torch.float16:
        return (gradient if gradient.dtype == dtype else gradient.to(dtype),)
    sizes = gradient.detach().abs().nan_to_num_(0.0, 0.0, 0.0)
    rows = tuple(range(gradient.ndim - axes, gradient.ndim))
    largest = sizes.amax(rows, keepdim=True) if gradient.numel() else sizes.sum(rows, keepdim=True)
    unit = largest.clamp(min=torch.finfo(largest.dtype).tiny * 2**16) / 2**15
    return (gradient / unit).to(dtype), unit


def coupled(
    evaluate: Callable[..., tuple[Tensor, ...]], learns: int, hands_over: bool = False
) -> Callable[..., Tensor]:
    """The same for a loss that compares examples: `differentiable(*inputs, summed)` is one number, or one an example.

    `evaluate(*inputs, weights, *asked)` returns a value an example, and the gradients of their weighted sum (None: all
    weights are 1). Where values are not summed, the weights are known in the backward pass alone, which evaluates once
    more; until then the inputs that learn are held, and copies of the others.
    """

    def total(*inputs: Any) -> tuple[Tensor, ...]:
        values, *gradients = evaluate(*inputs[:-learns], None, *inputs[-learns:])
        return values.sum(), *gradients

    class Coupled(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(asked: tuple[bool, ...], *inputs: Any) -> Tensor:
            return evaluate(*inputs, None, *(False,) * learns)[0]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            ctx.asked, *others = inputs
            ctx.save_for_backward(*(x for x in others if isinstance(x, Tensor)))
            ctx.others = [None if isinstance(x, Tensor) else (x,) for x in others]

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if x is None else x[0] for x in ctx.others]
            learned = [(x, wanted) for x, wanted in zip(inputs, ctx.asked, strict=False)]
            with torch.no_grad(), no_autocast(cotangent):
                _, *gradients = evaluate(*inputs, cotangent, *ctx.asked)
            results: list[Tensor | None] = []
            for gradient, (x, wanted) in zip(gradients, learned, strict=True):
                gradient = gradient.to(x.dtype)
                if torch.is_grad_enabled():
                    gradient = _Refused.apply(gradient, cotangent, *(x for x, _ in learned))
                results.append(gradient if wanted else None)
            return None, *results, *(None for _ in inputs[learns:])

    summed_up = with_gradients(total, learns, hands_over)

    def differentiable(*inputs: Any, summed: bool) -> Tensor:
        if summed:
            return summed_up(*inputs)[0]
        asked = tuple(map(may_learn, inputs[:learns]))
        with no_autocast(inputs[0]):
            if not any(asked):
                return evaluate(*inputs, None, *asked)[0]
            copies = (x.clone() if isinstance(x, Tensor) else x for x in map(_constant, inputs[learns:]))
            return Coupled.apply(asked, *inputs[:learns], *copies)

    return differentiable


def may_learn(x: Tensor) -> bool:
    """Whether a gradient with respect to x may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Without autocast, which is left for a call, but not where `torch.compile` passes the check by, nor backward."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if rounds(device) else contextlib.nullcontext()


def log_ratio(
    x: Tensor, y: Tensor, temperature: Scalar, may_be_empty: bool = False, class_group: ProcessGroup | None = None
) -> tuple[Softmax, Softmax, Tensor]:
    """p = softmax(x / T), q = softmax(y / T) and log(p / q), which comes from x - y so that close rows keep their digits."""
    # over ranks each sends numbers of its own, in tensors of one shape, so that equal rows have equal sums
    p, q = softmax(x, temperature, may_be_empty, class_group), softmax(y, temperature, may_be_empty, class_group)
    apart = torch.where(x.isneginf() & y.isneginf(), 0, x - y)
    return p, q, (apart - (p.peak - q.peak)) / temperature - (p.log_total - q.log_total)


def close_log_ratio(x: Tensor, y: Tensor) -> tuple[Softmax, Softmax, Tensor]:
    """The same at T = 1, less what the rounding of the two normalisers leaves of log sum q e^r, which is 0."""
    p, q, ratio = log_ratio(x, y, 1.0)
    return p, q, without_common_error(q.p, ratio)[0]


def without_common_error(q: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """r = log(p / q) less log sum q e^r, which is 0 but for an error common to all r, in rows that are close; and which are."""
    close = ratio.abs().amax(-1, keepdim=True) < 1
    return ratio - (q * torch.where(close, ratio, 0).expm1()).sum(-1, keepdim=True).log1p(), close


def less_log1p(z: Tensor) -> Tensor:
    """z - log(1 + z); where z is small by a series in s = z / (2 + z), of which log(1 + z) is 2 atanh(s)."""
    near = z.abs() < 0.25
    small = torch.where(near, z, 0)
    s = small / (2 + small)
    square, total = s * s, torch.zeros_like(s)
    for n in range(19, 1, -2):
        total = total * square + 1 / n
    return torch.where(near, s * (small - 2 * square * total), z - torch.where(near, 0, z).log1p())


def of_largest(p: Tensor, x: Tensor) -> Tensor:
    """x of p's largest class."""
    return torch.where(p == p.amax(-1, keepdim=True), x, -math.inf).amax(-1, keepdim=True)


def through_softmax(gradient: Tensor, p: Tensor) -> Tensor:
    """p (h - sum p h), given p and p h: the gradient with respect to logits, given h with respect to their softmax.

    First h of the largest class is taken off all h. Where that class has nearly all of p, its gradient is then the small
    number that it is, and not the difference of two large ones.
    """
    largest = p == p.detach().amax(-1, keepdim=True)
    h = torch.where(largest, gradient / torch.where(largest, p, 1), 0)
    origin = h.sum(-1, keepdim=True) / largest.sum(-1, keepdim=True, dtype=p.dtype)
    gradient = torch.where(largest, p * (h - origin), gradient - p * origin)
    return gradient - p * gradient.sum(-1, keepdim=True)


def difference_of_softmaxes(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """p - q, from r = log(p / q) as q (e^r - 1) where r is small, so that close rows keep their digits."""
    near = (q > 0) & (ratio < 1)
    return torch.where(near, q * torch.where(near, ratio, 0).expm1(), p - q)


def pulled_back(h: Tensor, p: Tensor, class_group: ProcessGroup | None = None) -> Tensor:
    """p (h - sum p h), the gradient of a softmax, with digits also where one class has nearly all of p. No p = 0 is felt.

    An infinite h, of a class that the other distribution excludes, counts as if that gave it the least number there is:
    the value is infinite there, and the gradient is finite and leads away from the class.
    """
    h = torch.where(p == 0, 0, torch.where(h.isposinf(), -math.log(torch.finfo(h.dtype).tiny), h))
    centered = h - class_sum(p * h, class_group)
    return p * (centered - class_sum(p * centered, class_group))


def kl_of_softmaxes(
    p: Softmax, q: Softmax, ratio: Tensor, class_group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """KL(q || p) over the last axis, and p - q.

    Summed as q (e^r - 1 - r) = p - q - q r, r = log(p / q): the terms are never negative, their sum is KL because p and
    q both sum to one, and an error common to all r (the rounding of the two normalisers) cancels to first order.
    """
    difference = difference_of_softmaxes(p.p, q.p, ratio)
    used = torch.where(q.p == 0, 0, ratio)
    if not (torch.compiler.is_compiling() or ratio.is_cpu):  # where each of the operations is a kernel
        return class_sum(difference - q.p * used, class_group).squeeze(-1).clamp(min=0), difference
    near = (used.abs() < NEAR) & (q.p > 0)
    close = q.p * exp_remainder(torch.where(near, used, 0))
    terms = torch.where(near, close, difference - q.p * used)
    difference, common = less_common_error(difference, q.p, class_group)
    return (class_sum(terms, class_group) - common**2 / 2).squeeze(-1).clamp(min=0), difference


def less_common_error(difference: Tensor, q: Tensor, class_group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """p - q = q (e^r - 1) less an error common to all r, so that it sums to 0; and its sum before."""
    total = class_sum(difference.detach(), class_group)
    common = torch.where(total.abs() < 0.1, total, 0)  # p or q may be empty
    return (difference - common * q) / (1 + common), common


NEAR = 0.5  # below it e^x - 1 - x loses digits


def exp_remainder(x: Tensor) -> Tensor:
    """e^x - 1 - x by its series, where |x| < `NEAR`: the difference of the two would have few digits."""
    total = torch.zeros_like(x)
    for n in range(9 if x.dtype == torch.float32 else 16, 1, -1):
        total = total * x + 1 / math.factorial(n)
    return x * x * total


def series_of_log1p(x: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + x) and x - log(1 + x), for -1/2 < x <= 1, both with all their digits.

    With s = x / (2 + x) the logarithm is 2 atanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...), and x - 2 s is s x.
    """
    s = x / (2 + x)
    square, total = s * s, torch.zeros_like(x)
    for n in range(13 if x.dtype == torch.float32 else 33, 1, -2):
        total = total * square + 2 / n
    tail = square * total
    return s * (2 + tail), s * (x - tail)


class Tilt(NamedTuple):
    """p = softmax(x / T) as q = softmax(y / T) times e^d over its mean, where d is (x - y) / T less its mean under q.

    `growth` is e^d - 1, `rise` its mean under q, and `excess` is q (growth - rise), which is (1 + rise) (p - q).
    """

    q: Tensor
    d: Tensor
    growth: Tensor
    rise: Tensor
    excess: Tensor


FAR = -1e30  # of an infinite logit, which is as good as infinite where another logit of its row is not


def tilt(x: Tensor, y: Tensor, temperature: Scalar, class_group: ProcessGroup | None = None) -> Tilt | None:
    """The way from q to p in few, large kernels; None but in eager PyTorch on a CPU, and where numbers are too far apart.

    Ranks that share the classes could not go different ways, and none goes this one.

    No normaliser is rounded that p and q do not share, so that close rows keep their digits.
    """
    if class_group is not None or not eager_on_cpu(x, y, temperature) or not x.numel():
        return None
    found = _tilt(x, y, float(temperature))
    largest = float(found.growth.amax())
    if math.isnan(largest):
        excluded = x.isneginf() & ~y.isneginf()
        x, y = (logits.nan_to_num(nan=math.nan, posinf=math.inf, neginf=FAR) for logits in (x, y))
        if all(bool((logits.amax(-1) > FAR).all()) for logits in (x, y)):
            found = _tilt(x, y, float(temperature))
            largest = float(found.growth.amax())
            if bool((found.q[excluded] > 0).any()):  # where the value is infinite, however small q is
                return None
    if largest > 1e7:  # e^d of a class that p needs not feel, unless its mean under p is large too
        largest = float((torch.linalg.vecdot(found.excess, found.growth) / (1 + found.rise.squeeze(-1))).amax())
    if not largest < 5e8:  # p would rest on what has few digits in q
        return None
    # the mean of e^d is at least 1, unless rounding has moved all d of a row, whose logits are then far above their differences
    return found if float(found.rise.amin()) > -0.5 else None


def _tilt(x: Tensor, y: Tensor, temperature: float) -> Tilt:
    d, q = x - y, quick_softmax(y, temperature)
    d.sub_(torch.linalg.vecdot(q, d).unsqueeze(-1))
    if temperature != 1:
        d.div_(temperature)
    growth = d.expm1()
    return Tilt(q, d, growth, torch.linalg.vecdot(q, growth).unsqueeze(-1), softmax_pulled_back(growth, q))


def quick_softmax(x: Tensor, temperature: float) -> Tensor:
    """softmax(x / T) in few kernels, for eager PyTorch."""
    return torch.softmax(_divided(x, temperature), -1)


def _divided(x: Tensor, temperature: float) -> Tensor:
    """x / T, for a softmax: a division that rounds must be of small numbers."""
    if temperature == 1:
        return x
    exact = math.frexp(temperature)[0] == 0.5
    return x / temperature if exact else (x - x.amax(-1, keepdim=True)).div_(temperature)


class Logs(NamedTuple):
    """p = softmax(x / T), q = softmax(y / T), and their logarithms."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor


def quick_logs(x: Tensor, y: Tensor, temperature: Scalar, class_group: ProcessGroup | None = None) -> Logs | None:
    """Few, large kernels for rows that lie too far apart for `tilt`; None but in eager PyTorch on a CPU.

    What is made of them is right where `far_apart` says so.
    """
    if class_group is not None or not eager_on_cpu(x, y, temperature) or not x.numel():
        return None
    log_p, log_q = (torch.log_softmax(_divided(z, float(temperature)), -1) for z in (x, y))
    return Logs(log_p.exp(), log_q.exp(), log_p, log_q)


def far_apart(value: Tensor) -> bool:
    """Whether a divergence is so large in all rows that a difference of logarithms has its digits, and finite."""
    return bool(((value > 0.05) & (value < math.inf)).all())


def softmax_pulled_back(x: Tensor, p: Tensor) -> Tensor:
    """p (x - sum p x), for which PyTorch has one kernel: the gradient of a softmax."""
    return torch.ops.aten._softmax_backward_data(x, p, -1, p.dtype)


def kl_and_gradient(
    x: Tensor, y: Tensor, temperature: Scalar, class_group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """KL(softmax(y / T) || softmax(x / T)) over the last axis, and its gradient (p - q) / T."""
    tilted = tilt(x, y, temperature, class_group)
    if tilted is not None:
        scale = 1 + tilted.rise
        return kl_of_tilt(tilted), tilted.excess.div_(scale if _is_one(temperature) else temperature * scale)
    far = _kl_of_logs(x, y, temperature, class_group)
    if far is not None:
        return far
    p, q, ratio = log_ratio(x, y, temperature, class_group=class_group)
    value, difference = kl_of_softmaxes(p, q, ratio, class_group)
    return value, difference / temperature


def _kl_of_logs(
    x: Tensor, y: Tensor, temperature: Scalar, class_group: ProcessGroup | None
) -> tuple[Tensor, Tensor] | None:
    """The same in few kernels where `quick_logs` gives them."""
    logs = quick_logs(x, y, temperature, class_group)
    if logs is None:
        return None
    value = torch.linalg.vecdot(logs.q, logs.log_q.sub_(logs.log_p))
    return (value, logs.p.sub_(logs.q).div_(temperature)) if far_apart(value) else None


def kl_of_tilt(tilted: Tilt) -> Tensor:
    """KL(q || p) = log(1 + rise) less the mean of d under q, which is 0 but for rounding.

    Where all rows nearly coincide, e^d - 1 - d is summed, and log(1 + rise) - rise, which is smaller, added to that.
    """
    value = (tilted.rise.squeeze(-1).log1p() - torch.linalg.vecdot(tilted.q, tilted.d)).clamp_(min=0)
    if not nearly_equal(value):
        return value
    near = tilted.d.abs() < NEAR
    beyond = torch.where(near, exp_remainder(torch.where(near, tilted.d, 0)), tilted.growth - tilted.d)
    rise = tilted.rise.squeeze(-1)
    return (torch.linalg.vecdot(tilted.q, beyond) + (rise.log1p() - rise)).clamp_(min=0)


def nearly_equal(value: Tensor) -> bool:
    """Whether a divergence is so small in all rows that a difference of large numbers has few digits of it."""
    return float(value.amax()) < 4e-3


def softmaxes(x: Tensor, y: Tensor, temperature: Scalar = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(x / T), q = softmax(y / T) and p - q, of which close rows keep the digits.

    Both p and q sum to one, so what their difference sums to is an error that is common to all logarithms of ratios.
    """
    tilted = tilt(x, y, temperature)
    if tilted is not None:
        return quick_softmax(x, float(temperature)), tilted.q, tilted.excess.div_(1 + tilted.rise)
    (p, *_), (q, *_), ratio = log_ratio(x, y, temperature)
    difference = difference_of_softmaxes(p, q, ratio)
    return p, q, difference - p * difference.sum(-1, keepdim=True)


def cross_entropy_and_gradient(x: Tensor, target: Tensor, temperature: Scalar = 1.0) -> tuple[Tensor, Tensor]:
    """-sum target log p, p = softmax(x / T), and its gradient (p sum target - target) / T."""
    return cross_entropy_of_softmax(softmax(x, temperature), x, target, temperature)


def cross_entropy_of_softmax(p: Softmax, x: Tensor, target: Tensor, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """The same where p may leave out classes of x, whose target is 0.

    A class with target 0 adds nothing, even at p = 0. NaN, wherever it is, is felt in the first term.
    """
    total = target.sum(-1, keepdim=True)
    value = (p.log_total * total).squeeze(-1) - dot(target, x - p.peak) / temperature
    gradient = p.p * total - target
    return value, gradient if _is_one(temperature) else gradient / temperature


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, for any finite x; a row of zeros (or subnormals) becomes zeros, with gradient 0."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(x.dtype).tiny
    x = x / torch.where(zero, math.inf, scale)
    square = (x * x).sum(-1, keepdim=True)
    return x / torch.where(zero, 1, square).sqrt()


def unit_pull(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to x, given that with respect to `unit(x)`."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(x.dtype).tiny
    scaled = x / torch.where(zero, math.inf, scale)
    length = torch.where(zero, math.inf, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))
    direction = scaled / length
    across = gradient - (gradient * direction).sum(-1, keepdim=True) * direction
    return across / length / torch.where(zero, 1, scale)
