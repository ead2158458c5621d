"""The numerical care that several losses share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdtorch._typing import Scalar


def widen(*arrays: Tensor) -> tuple[Tensor, ...]:
    """All in float64 if one of them is, else in float32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in arrays) else torch.float32
    return tuple(x.to(dtype) for x in arrays)


def positive(name: str, value: Scalar, like: Tensor) -> Scalar:
    """`value` if it is finite and above 0; an array is not asked, which would wait for it, so a bad one becomes NaN."""
    return _number(name, value, like, "finite and greater than 0", lambda x: (x > 0) & (x < math.inf))


def non_negative(name: str, value: Scalar, like: Tensor) -> Scalar:
    return _number(name, value, like, "finite and at least 0", lambda x: (x >= 0) & (x < math.inf))


def fraction(name: str, value: Scalar, like: Tensor) -> Scalar:
    return _number(name, value, like, "between 0 and 1", lambda x: (x >= 0) & (x <= 1))


def _number(name: str, value: Scalar, like: Tensor, expected: str, test: Callable[[Any], Any]) -> Scalar:
    if isinstance(value, Tensor):
        value = value.detach().to(like)
        return torch.where(test(value), value, math.nan)
    if not test(value):
        raise ValueError(f"`{name}` must be {expected}, got {value}")
    return float(value)


def check_classes(logits: Tensor) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(f"the logits must have at least 2 classes on the last axis, got shape {list(logits.shape)}")


def opaque(schema: str, shapes: Callable[..., Any]) -> Callable[[Callable], Callable]:
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


@opaque(
    "(Tensor index, int size, str name) -> Tensor", lambda index, size, name: torch.empty_like(index, dtype=torch.int64)
)
def _in_range(index: Tensor, size: int, name: str) -> Tensor:
    wrong = (index < 0) | (index >= size)
    if index.device.type == "cpu" and wrong.any():  # elsewhere the kernels themselves raise, without a wait here
        raise IndexError(
            f"`{name}` must lie in 0 .. {size - 1}, got {index[wrong][0].item()}; mask what has none by `where`"
        )
    return index.long().clone()


def valid_index(name: str, index: Tensor, size: int) -> Tensor:
    """The index as int64; an error that names it if it is out of range."""
    return _in_range(index, size, name)


def take_class(x: Tensor, labels: Tensor) -> Tensor:
    """`x[..., labels]`, one class an example."""
    return x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def is_class(x: Tensor, labels: Tensor) -> Tensor:
    """True at each example's label."""
    return labels.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)


def log_softmax(x: Tensor, temperature: Scalar = 1.0) -> Tensor:
    """Of x / temperature over the last axis; -inf everywhere, with gradient 0, where every entry is -inf."""
    _, _, z, log_total = _softmax(x, temperature)
    return z - log_total


def cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    """-sum q log p over the last axis, where a class with q = 0 adds nothing, even at log p = -inf."""
    return -torch.where(q == 0, 0, q * log_p).sum(-1)


def _softmax(x: Tensor, temperature: Scalar) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """softmax(x / T), the largest entry of x, z = (x - largest) / T and log sum exp z."""
    peak = x.detach().amax(-1, keepdim=True)
    peak = torch.where(torch.isneginf(peak), 0, peak)
    z = (x - peak) / temperature
    weight = z.exp()
    total = weight.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1, total)
    return weight / total, peak, z, total.log()


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


def rowwise(value_and_gradient: Callable[..., tuple[Tensor, Tensor]], twice: bool = True) -> Callable[..., Tensor]:
    """A function of rows from one that returns its value and its gradient with respect to its first argument.

    The value of a row depends on that row alone; every other argument is constant. With `twice` the gradient is made of
    differentiable operations, so that the result can be differentiated again; without, that is refused.
    """

    class Rowwise(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            return value_and_gradient(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(*inputs, output[1])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
            *inputs, gradient = ctx.saved_tensors
            if torch.is_grad_enabled():  # the gradient may be differentiated in its turn
                gradient = value_and_gradient(*inputs)[1] if twice else _Refused.apply(gradient, inputs[0])
            return cotangents[0].unsqueeze(-1) * gradient, *(None for _ in inputs[1:])

    def value(x: Tensor, *constants: Tensor | float) -> Tensor:
        constants = _constants(x, constants)
        return (Rowwise.apply if _differentiated(x) else value_and_gradient)(x, *constants)[0]

    return value


def pulled_back(value: Callable[..., Tensor], pull: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function whose gradient with respect to its first argument is `pull(cotangent, *inputs)`, both opaque.

    A second derivative is refused.
    """

    class PulledBack(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Tensor) -> Tensor:
            return value(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            gradient = pull(cotangent.detach(), *(x.detach() for x in inputs))
            if torch.is_grad_enabled():
                gradient = _Refused.apply(gradient, cotangent, inputs[0])
            return gradient, *(None for _ in inputs[1:])

    def pulled(x: Tensor, *constants: Tensor | float) -> Tensor:
        constants = _constants(x, constants)
        return (PulledBack.apply if _differentiated(x) else value)(x, *constants)

    return pulled


def _constants(x: Tensor, values: tuple[Tensor | float, ...]) -> tuple[Tensor, ...]:
    return tuple(v.detach() if isinstance(v, Tensor) else x.new_full((), v) for v in values)


def _differentiated(x: Tensor) -> bool:
    """Whether a gradient may be asked for; `torch.compile` cannot trace an `autograd.Function` where none is."""
    return not torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())


def log_ratio(x: Tensor, y: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p = softmax(x / T), q = softmax(y / T) and log(p / q), which comes from x - y so that close rows keep their digits."""
    p, peak_x, _, log_total_x = _softmax(x, temperature)
    q, peak_y, _, log_total_y = _softmax(y, temperature)
    both = torch.isneginf(x) & torch.isneginf(y)
    r = ((x - y) - (peak_x - peak_y)) / temperature - (log_total_x - log_total_y)
    return p, q, torch.where(both, 0, r)


def kl_and_gradient(x: Tensor, y: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(y / T) || softmax(x / T)) over the last axis, and its gradient (p - q) / T.

    Summed as q (e^r - 1 - r), r = log(p / q): the terms are never negative, their sum is KL because p and q both
    sum to one, and an error common to all r (the rounding of the two normalisers) cancels to first order.
    """
    p, q, r = log_ratio(x, y, temperature)
    near = (q > 0) & (r < 1)
    growth = torch.where(near, r, 0).expm1()
    used = torch.where(q > 0, r, 0)
    terms = torch.where(near, q * (growth - used), (p - q) - q * used)
    return terms.clamp(min=0).sum(-1), torch.where(near, q * growth, p - q) / temperature


kl_divergence = rowwise(kl_and_gradient)


def binary_and_others(x: Tensor, label: Tensor, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """Logits, at temperature 1, of (the label, any other class); and x without the label."""
    others = torch.where(label, -math.inf, x)
    _, peak, _, log_total = _softmax(others, temperature)
    largest = x.detach().amax(-1, keepdim=True)
    target = torch.where(label, x, 0).sum(-1, keepdim=True)
    rest = (peak - largest) / temperature + log_total
    rest = torch.where(torch.isneginf(others).all(-1, keepdim=True), -math.inf, rest)
    return torch.cat([(target - largest) / temperature, rest], -1), others


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, for any finite x; a row of zeros (or subnormals) becomes zeros, with gradient 0."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(x.dtype).tiny
    x = x / torch.where(zero, 1, scale)
    square = (x * x).sum(-1, keepdim=True)
    return torch.where(zero, 0, x / torch.where(zero, 1, square).sqrt())
