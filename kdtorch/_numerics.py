"""Numerically careful functions that several losses share."""

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
    """The dtype in which these arrays are computed: float64 if one of them is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in arrays) else torch.float32


def promote(*arrays: Tensor) -> tuple[Tensor, ...]:
    """The arrays in float64 if one of them is, else in float32."""
    dtype = widest(*arrays)
    return tuple(x.to(dtype) for x in arrays)


def positive(name: str, value: Scalar, *like: Tensor, constant: bool = False) -> Scalar:
    """`value`, or an error if it is not finite and above 0. Reading a tensor would wait for it; a bad one becomes NaN.

    A tensor has a gradient unless it is `constant`, as all other settings are.
    """
    return _number(name, value, like, "finite and greater than 0", lambda x: (x > 0) & (x < math.inf), constant)


def non_negative(name: str, value: Scalar, *like: Tensor) -> Scalar:
    return _number(name, value, like, "finite and at least 0", lambda x: (x >= 0) & (x < math.inf))


def fraction(name: str, value: Scalar, *like: Tensor) -> Scalar:
    return _number(name, value, like, "between 0 and 1", lambda x: (x >= 0) & (x <= 1))


def finite(name: str, value: float) -> float:
    """A number that determines how a loss is computed and must not be an array; an error if it is not finite."""
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
    """A number as a tensor, in the dtype in which the others are computed."""
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
    """Whether T is the number 1, so that a multiplication can be left out. The value of a tensor is not read."""
    return isinstance(temperature, float) and temperature == 1


def weigh(weight: Scalar, value: Tensor) -> Tensor:
    """weight × value; with weight 0 the result is 0 even if the value is infinite."""
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
    """Make an operator of a function that branches on values, so that `torch.compile` and `vmap` do not look inside it.

    `shapes` returns empty results of the right shapes. `vmap` calls the function once per example. The operator has no
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
    """A copy of a tensor that a user may change before the backward pass or has created under `torch.inference_mode`.

    Under `torch.compile` an operator makes the copy, because the compiler would store the original instead of a clone.
    """
    return _copy(x) if torch.compiler.is_compiling() else x.clone()


def _inside(index: Tensor, size: int | Tensor, name: str) -> Tensor:
    index = index.long()  # a narrow integer may not hold the size
    wrong = (index < 0) | (index >= size)
    if index.device.type == "cpu" and wrong.any():  # elsewhere the kernels raise, which needs no waiting
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
    """The index as int64, or an error that names it if it is out of range. A size from several ranks is a tensor."""
    if isinstance(size, Tensor):
        return _in_range_of_ranks(index, size, name)
    if not torch.compiler.is_compiling():
        try:
            return _inside(index, size, name)
        except RuntimeError:  # under vmap only an operator may read values
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
    """The softmax over the last axis, which may be spread over ranks.

    A row that is all -inf has no distribution: it gives NaN, or p = 0 if it `may_be_empty`. The largest entry is
    subtracted before the division by T, because the rounding of x / T grows with the size of x.
    """
    peak = class_max(x, class_group)
    if may_be_empty:
        peak = peak.clamp(min=torch.finfo(x.dtype).min)
    below = x - peak
    if isinstance(temperature, Tensor):  # its derivative would multiply -inf by the 0 of its class
        below = torch.maximum(below, -1e5 * temperature)
    # PyTorch on a CPU computes a power of 2 in a quarter of the time of a power of e
    weight = (below * (math.log2(math.e) / temperature)).exp2_()
    total = class_sum(weight, class_group)
    if may_be_empty:
        total = total.clamp(min=1)  # the largest entry alone adds 1, unless the row is empty
    return Softmax(weight / total, peak, total.log())


def dot(q: Tensor, x: Tensor) -> Tensor:
    """sum q x over the last axis, where 0 times infinity is 0. NaN may be lost too; the caller must keep it."""
    if not eager_on_cpu(q, x):
        return torch.where(q == 0, 0, q * x).sum(-1)
    result = torch.linalg.vecdot(q, x)
    if not result.isfinite().all():  # on a CPU `torch.where` takes ten times as long
        result = (q * x).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf).sum(-1)
    return result


def eager_on_cpu(*arrays: Tensor | float) -> bool:
    """Whether all tensors are ordinary ones on a CPU, in eager PyTorch, and no derivative is traced.

    Then values may be read, and few large kernels are fastest, because nothing fuses small ones as a compiler does.
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
    """A value whose derivative with respect to the inputs is not implemented: an error, where autograd would give 0."""

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


BLOCK = 2**17  # entries in a block on a CPU, so that its caches hold all that is computed from them


def with_gradients(
    evaluate: Callable[..., tuple[Tensor, ...]], learns: int, hands_over: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """Turn a function that computes its value and its gradients together into a differentiable function.

    `evaluate(*inputs, *asked)` returns the value, the gradient with respect to each of the first `learns` inputs, and
    any further results, which are constants. Gradients that are not `asked` for may be empty. A gradient has the axes
    of its input, which begin with the value's; the gradient with respect to a scalar has the value's axes. Until the
    backward pass only the gradients are stored, in the dtypes of their inputs, so the inputs may be changed in place. A
    second derivative is an error. A loss whose gradients may take most of the memory of a step sets `hands_over`: the
    last backward pass then returns the stored gradients themselves, without a copy.
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
            # empty tensors, which take no memory; through them autograd reaches the error for a second derivative
            edges = (x.flatten()[:0].clone() for x, wanted in zip(learned, asked, strict=True) if wanted)
            results = WithGradients.apply(asked, *edges, *learned, *map(_constant, inputs[learns:]))
            return results[: len(results) - _parts(learned, asked)]

    return differentiable


def _eager(x: Tensor | None) -> bool:
    """Whether x is an ordinary tensor, outside `torch.compile` and the transforms of `torch.func`."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and type(x) is Tensor


def _scale(x: Tensor, factor: Tensor) -> Tensor:
    """x times a number, in place. Half precision is converted to the number's dtype, one part at a time."""
    if x.dtype == factor.dtype:
        return x.mul_(factor)
    for part in x.view(-1).split(2**20):
        part.copy_(part.to(factor.dtype).mul_(factor.flatten()))
    return x


def _constant(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _parts(learned: Sequence[Tensor], asked: tuple[bool, ...]) -> int:
    """The number of tensors that store the gradients."""
    return sum(2 if x.dtype == torch.float16 else 1 for x, wanted in zip(learned, asked, strict=True) if wanted)


def pack(gradient: Tensor, dtype: torch.dtype, axes: int) -> tuple[Tensor, ...]:
    """A gradient in another dtype; in float16, whose range is small, as multiples of one number per row.

    A row extends over the last `axes` axes. Users of float16 scale the loss so that its gradient does not underflow,
    but that scale arrives only in the backward pass. An entry that is not finite stays as it is, and the rest of its
    row too.
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
    """The same for a loss that compares examples; `differentiable(*inputs, summed)` returns the sum, or one value each.

    `evaluate(*inputs, weights, *asked)` returns one value per example, and the gradients of their weighted sum (None:
    all weights are 1). If the values are not summed, the weights are known only in the backward pass, which evaluates
    once more. Until then the inputs with a gradient are stored, and copies of the others.
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
    """Whether a gradient with respect to x may be needed."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast. `checked` disables it too, but not under `torch.compile` nor in the backward pass."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if rounds(device) else contextlib.nullcontext()


def log_ratio(
    x: Tensor, y: Tensor, temperature: Scalar, may_be_empty: bool = False, class_group: ProcessGroup | None = None
) -> tuple[Softmax, Softmax, Tensor]:
    """p = softmax(x / T), q = softmax(y / T) and log(p / q), which comes from x - y so that close rows keep their digits."""
    # with classes spread over ranks, x and y are summed by collectives of the same shape, so equal rows have equal sums
    p, q = softmax(x, temperature, may_be_empty, class_group), softmax(y, temperature, may_be_empty, class_group)
    apart = torch.where(x.isneginf() & y.isneginf(), 0, x - y)
    return p, q, (apart - (p.peak - q.peak)) / temperature - (p.log_total - q.log_total)


def close_log_ratio(x: Tensor, y: Tensor) -> tuple[Softmax, Softmax, Tensor]:
    """The same at T = 1, without log sum q e^r, which is 0 except for the rounding of the two normalisers."""
    p, q, ratio = log_ratio(x, y, 1.0)
    return p, q, without_common_error(q.p, ratio)[0]


def without_common_error(q: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """r = log(p / q) minus, in close rows, log sum q e^r, an error common to all r; and which rows are close."""
    close = ratio.abs().amax(-1, keepdim=True) < 1
    return ratio - (q * torch.where(close, ratio, 0).expm1()).sum(-1, keepdim=True).log1p(), close


def less_log1p(z: Tensor) -> Tensor:
    """z - log(1 + z); for a small z by a series in s = z / (2 + z), because log(1 + z) = 2 atanh(s)."""
    near = z.abs() < 0.25
    small = torch.where(near, z, 0)
    s = small / (2 + small)
    square, total = s * s, torch.zeros_like(s)
    for n in range(19, 1, -2):
        total = total * square + 1 / n
    return torch.where(near, s * (small - 2 * square * total), z - torch.where(near, 0, z).log1p())


def of_largest(p: Tensor, x: Tensor) -> Tensor:
    """The entry of x at the largest class of p."""
    return torch.where(p == p.amax(-1, keepdim=True), x, -math.inf).amax(-1, keepdim=True)


def through_softmax(gradient: Tensor, p: Tensor) -> Tensor:
    """p (h - sum p h), given p and p h: the gradient with respect to logits, given h with respect to their softmax.

    First the h of the largest class is subtracted from all h. If that class has nearly all of the probability, its
    small gradient would otherwise be the difference of two large numbers.
    """
    largest = p == p.detach().amax(-1, keepdim=True)
    h = torch.where(largest, gradient / torch.where(largest, p, 1), 0)
    origin = h.sum(-1, keepdim=True) / largest.sum(-1, keepdim=True, dtype=p.dtype)
    gradient = torch.where(largest, p * (h - origin), gradient - p * origin)
    return gradient - p * gradient.sum(-1, keepdim=True)


def difference_of_softmaxes(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """p - q; where r = log(p / q) is small, it is q (e^r - 1), so that close rows keep their digits."""
    near = (q > 0) & (ratio < 1)
    return torch.where(near, q * torch.where(near, ratio, 0).expm1(), p - q)


def pulled_back(h: Tensor, p: Tensor, class_group: ProcessGroup | None = None) -> Tensor:
    """p (h - sum p h), the gradient through a softmax, accurate even if one class has nearly all of p.

    A class with p = 0 has no effect. An infinite h belongs to a class at -inf in the other distribution. It counts as
    if that distribution gave the class the smallest positive number: the value is infinite, but the gradient is finite
    and leads away from the class.
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
    if not (torch.compiler.is_compiling() or ratio.is_cpu):  # each operation is a kernel of its own
        return class_sum(difference - q.p * used, class_group).squeeze(-1).clamp(min=0), difference
    near = (used.abs() < NEAR) & (q.p > 0)
    close = q.p * exp_remainder(torch.where(near, used, 0))
    terms = torch.where(near, close, difference - q.p * used)
    difference, common = less_common_error(difference, q.p, class_group)
    return (class_sum(terms, class_group) - common**2 / 2).squeeze(-1).clamp(min=0), difference


def less_common_error(difference: Tensor, q: Tensor, class_group: ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """p - q = q (e^r - 1) without an error common to all r, so that it sums to 0; and the sum before the correction."""
    total = class_sum(difference.detach(), class_group)
    common = torch.where(total.abs() < 0.1, total, 0)  # a large sum means that p or q is empty
    return (difference - common * q) / (1 + common), common


NEAR = 0.5  # below it e^x - 1 - x loses digits


def exp_remainder(x: Tensor) -> Tensor:
    """e^x - 1 - x by its series, for |x| < `NEAR`, where the subtraction would lose digits."""
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
    """p = softmax(x / T) from q = softmax(y / T) as q e^d / E_q[e^d], where d is (x - y) / T minus its mean under q.

    `growth` is e^d - 1, `rise` its mean under q, and `excess` is q (growth - rise), which is (1 + rise) (p - q).
    """

    q: Tensor
    d: Tensor
    growth: Tensor
    rise: Tensor
    excess: Tensor


FAR = -1e30  # replaces -inf; if another logit of the row is above it, the effect is the same


def tilt(x: Tensor, y: Tensor, temperature: Scalar, class_group: ProcessGroup | None = None) -> Tilt | None:
    """p in terms of q, in few large kernels; only in eager PyTorch on a CPU, and None if the logits are too far apart.

    With classes spread over ranks it is None too, because all ranks would have to take the same branch. p and q share
    their rounded normaliser, so close rows keep their digits.
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
            if bool((found.q[excluded] > 0).any()):  # the value is infinite, however small q is
                return None
    if largest > 1e7:  # harmless if p is small there, that is, if the mean under p is not large
        largest = float((torch.linalg.vecdot(found.excess, found.growth) / (1 + found.rise.squeeze(-1))).amax())
    if not largest < 5e8:  # p would be computed from entries of q that have few digits
        return None
    # E_q[e^d] is at least 1, unless rounding shifts all d of a row because its logits are far larger than their
    # differences
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
    """x / T for a softmax; if the division rounds, the largest entry is subtracted first, so that numbers are small."""
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
    """Softmaxes and logarithms in few large kernels, for rows too far apart for `tilt`; only in eager PyTorch on a CPU.

    A divergence computed from them is accurate if `far_apart` returns True for it.
    """
    if class_group is not None or not eager_on_cpu(x, y, temperature) or not x.numel():
        return None
    log_p, log_q = (torch.log_softmax(_divided(z, float(temperature)), -1) for z in (x, y))
    return Logs(log_p.exp(), log_q.exp(), log_p, log_q)


def far_apart(value: Tensor) -> bool:
    """Whether a divergence is finite in all rows, and large enough that a difference of logarithms is accurate."""
    return bool(((value > 0.05) & (value < math.inf)).all())


def softmax_pulled_back(x: Tensor, p: Tensor) -> Tensor:
    """p (x - sum p x), the gradient through a softmax, by PyTorch's kernel for it."""
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
    """The same in few kernels, if `quick_logs` gives a result that is accurate."""
    logs = quick_logs(x, y, temperature, class_group)
    if logs is None:
        return None
    value = torch.linalg.vecdot(logs.q, logs.log_q.sub_(logs.log_p))
    return (value, logs.p.sub_(logs.q).div_(temperature)) if far_apart(value) else None


def kl_of_tilt(tilted: Tilt) -> Tensor:
    """KL(q || p) = log(1 + rise) minus the mean of d under q, which is 0 except for rounding.

    If all rows nearly coincide, it is the mean of e^d - 1 - d under q plus log(1 + rise) - rise, which is smaller.
    """
    value = (tilted.rise.squeeze(-1).log1p() - torch.linalg.vecdot(tilted.q, tilted.d)).clamp_(min=0)
    if not nearly_equal(value):
        return value
    near = tilted.d.abs() < NEAR
    beyond = torch.where(near, exp_remainder(torch.where(near, tilted.d, 0)), tilted.growth - tilted.d)
    rise = tilted.rise.squeeze(-1)
    return (torch.linalg.vecdot(tilted.q, beyond) + (rise.log1p() - rise)).clamp_(min=0)


def nearly_equal(value: Tensor) -> bool:
    """Whether a divergence is so small in all rows that computing it as a difference of large numbers loses digits."""
    return float(value.amax()) < 4e-3


def softmaxes(x: Tensor, y: Tensor, temperature: Scalar = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(x / T), q = softmax(y / T) and p - q, which is accurate for close rows too.

    Both p and q sum to one, so the sum of their differences is an error common to all log ratios, and is removed.
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
    """The same for a p that may leave out classes of x whose target is 0.

    A class with target 0 contributes nothing, even at p = 0. NaN in any class reaches the value through the first term.
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
    """The gradient with respect to x, given the gradient with respect to `unit(x)`."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(x.dtype).tiny
    scaled = x / torch.where(zero, math.inf, scale)
    length = torch.where(zero, math.inf, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))
    direction = scaled / length
    across = gradient - (gradient * direction).sum(-1, keepdim=True) * direction
    return across / length / torch.where(zero, 1, scale)
