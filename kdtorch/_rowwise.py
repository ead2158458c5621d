"""What runs a function of rows: under masks, in blocks, in any precision, and with a gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdtorch._numerics import BLOCK, eager_on_cpu, kl_and_gradient, no_autocast, widest
from kdtorch._reduce import zero_masked

Input = Tensor | float


def rowwise(value_and_gradient: Callable[..., tuple[Tensor, Tensor]], axes: int = 1) -> Callable[..., Tensor]:
    """A function of rows from one that returns the value of each and its gradient with respect to its first argument.

    The value of a row depends on that row alone. The first argument is `[*batch, n]`, or has so many `axes` after the
    batch's. The others are constant: `[*batch, ...]`, or numbers; a number that is a tensor and requires a gradient gets
    one. What is returned takes them as the user gave them, in half precision too, and a mask of the batch, `where=`.

    Until the backward pass only the gradient is held, in the dtype of the first argument: neither another copy of it nor
    anything of the others, which may be written into or come from `torch.inference_mode()`. The derivative of the
    gradient goes back to the inputs themselves, and needs them as they were.
    """

    def with_slopes(learned: Sequence[int], x: Tensor, *others: Input) -> tuple[Tensor, ...]:
        """The value, its gradient, and its derivative with respect to each of the numbers that have one."""

        def value(number: Tensor, place: int) -> Tensor:
            return value_and_gradient(x, *others[:place], number, *others[place + 1 :])[0]

        slopes = (
            torch.func.jvp(lambda number, i=i: value(number, i), (others[i],), (torch.ones_like(others[i]),))[1]
            for i in learned
        )
        return *value_and_gradient(x, *others), *slopes

    class Rowwise(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(learned: Sequence[int], where: Tensor | None, x: Tensor, *others: Input) -> tuple[Tensor, ...]:
            def parts(*inputs: Input) -> tuple[Tensor, ...]:
                value, gradient, *slopes = with_slopes(learned, *inputs)
                return value, *_pack(gradient, x.dtype, axes), *slopes

            return by_rows(parts, where, x, *others, axes=axes)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.learned, *given = inputs
            held = output[1:]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*held)
            ctx.held, ctx.inputs, ctx.versions = len(held), (), ()
            if torch.compiler.is_compiling():  # there is no second derivative
                ctx.save_for_backward(*held)
                return
            ctx.numbers = [None if isinstance(v, Tensor) else v for v in given]
            ctx.tensors = [i for i, v in enumerate(given) if isinstance(v, Tensor)]
            tensors = [given[i] for i in ctx.tensors]
            if torch._C._are_functorch_transforms_active():
                ctx.save_for_backward(*held, *map(_saveable, tensors))
            else:
                ctx.save_for_backward(*held)
                ctx.inputs, ctx.versions = tensors, [None if v.is_inference() else v._version for v in tensors]

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            asked = ctx.needs_input_grad[2:]
            if cotangent is None:
                return None, None, *(None for _ in asked)
            saved = ctx.saved_tensors
            held, tensors = saved[: ctx.held], saved[ctx.held :] or ctx.inputs
            slopes = held[ctx.held - len(ctx.learned) :]
            above = cotangent.reshape(cotangent.shape + (1,) * axes)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _check_unchanged(ctx.inputs, ctx.versions)
                given = list(ctx.numbers)
                for i, tensor in zip(ctx.tensors, tensors, strict=True):
                    given[i] = _saveable(tensor)
                where, *inputs = given
                with no_autocast(cotangent):
                    _, gradient, *slopes = with_slopes(ctx.learned, *_wide(where, *inputs))
                gradient = (above * gradient).to(inputs[0].dtype)
            else:
                gradient = _scaled(above, *held[: ctx.held - len(slopes)], axes=axes) if asked[0] else None
            numbers = {i: (cotangent * slope).sum() for i, slope in zip(ctx.learned, slopes, strict=True)}
            return None, None, gradient, *(numbers.get(i) for i in range(len(asked) - 1))

    Rowwise.forward.__signature__ = inspect.signature(Rowwise.forward)  # type: ignore[attr-defined]  # asked at every call

    def value(x: Tensor, *others: Input, where: Tensor | None = None) -> Tensor:
        constants = [v.detach() if isinstance(v, Tensor) and v.ndim else v for v in others]
        traced = torch.is_grad_enabled()
        learned = tuple(i for i, v in enumerate(constants) if traced and isinstance(v, Tensor) and v.requires_grad)
        with no_autocast(x):
            if learned or (traced and x.requires_grad):
                return Rowwise.apply(learned, where, x, *constants)[0]
            return by_rows(lambda *inputs: value_and_gradient(*inputs)[:1], where, x, *constants, axes=axes)[0]

    return value


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], where: Tensor | None, x: Tensor, *others: Input, axes: int = 1
) -> tuple[Tensor, ...]:
    """What a function makes of the rows of x and of the others, in float32 or wider; what it makes of masked rows is 0.

    On a CPU it is given the kept rows alone, and no more of them at once than its caches hold; so no whole copy is made
    of inputs in half precision. Elsewhere it is given all, with 0 in the masked rows.
    """
    batch = x.shape[: x.ndim - axes]
    if not eager_on_cpu(x, *others) or not batch or (where is None and x.numel() < 4 * BLOCK):
        return function(*_wide(where, x, *others))
    rows = [v.reshape(-1, *v.shape[len(batch) :]) if _has_rows(v) else v for v in (x, *others)]
    number = len(rows[0])
    kept = None if where is None else where.reshape(-1).nonzero().squeeze(-1)
    if kept is not None and len(kept) == number:
        kept = None
    size = max(BLOCK * number // max(x.numel(), 1), 1) if x.numel() >= 4 * BLOCK else max(number, 1)
    results: list[Tensor] = []
    for start in range(0, max(number if kept is None else len(kept), 1), size):
        block = slice(start, start + size) if kept is None else kept[start : start + size]
        parts = function(*_wide(None, *(v[block] if _has_rows(v) else v for v in rows)))
        if not results:
            results = [_room(part, x, batch, kept is not None) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result.view(number, *part.shape[1:])[block] = part
    return tuple(results)


def _room(part: Tensor, x: Tensor, batch: torch.Size, zero: bool) -> Tensor:
    """For what is made of all rows: what has the shape of x lies in memory as x does. It is no view, so that it may be
    written into when a user has it."""
    if len(batch) == 1 and part.shape[1:] == x.shape[1:]:
        return (torch.zeros_like if zero else torch.empty_like)(x, dtype=part.dtype)
    return (part.new_zeros if zero else part.new_empty)(batch + part.shape[1:])


def _has_rows(value: Input) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _wide(where: Tensor | None, *inputs: Input) -> tuple[Input, ...]:
    """The inputs in float32 or wider, with 0 in the masked rows."""
    dtype = widest(*filter(_has_rows, inputs))  # type: ignore[arg-type]
    wide = (v.to(dtype) if _has_rows(v) and v.is_floating_point() else v for v in inputs)  # type: ignore[union-attr]
    return tuple(zero_masked(where, v)[0] if _has_rows(v) else v for v in wide)  # type: ignore[arg-type]


def _pack(gradient: Tensor, dtype: torch.dtype, axes: int) -> tuple[Tensor, ...]:
    """A gradient in another dtype; in float16, whose range is small, as multiples of a number for each row.

    Users of float16 multiply the loss, so that its gradient does not vanish, in the backward pass, which is later.
    """
    if dtype != torch.float16:
        return (gradient.to(dtype),)
    largest = gradient.abs().amax(tuple(range(-axes, 0)), keepdim=True)
    unit = largest.clamp(min=torch.finfo(largest.dtype).tiny * 2**16) / 2**15
    return (gradient / unit).to(dtype), unit


def _scaled(above: Tensor, gradient: Tensor, unit: Tensor | None = None, *, axes: int) -> Tensor:
    """The cotangent times a packed gradient, in its dtype."""
    if unit is not None:
        above = above * unit
    if above.dtype == gradient.dtype:
        return above * gradient
    return by_rows(lambda g, a: ((a * g).to(gradient.dtype),), None, gradient, above, axes=axes)[0]


def _saveable(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


def _check_unchanged(tensors: Sequence[Tensor], versions: Sequence[int | None]) -> None:
    for x, version in zip(tensors, versions, strict=True):
        if version is not None and x._version != version:
            raise RuntimeError(
                f"the second derivative of a loss needs the inputs that it was given, but one of shape {list(x.shape)} was "
                "written into since; take the derivatives before, or give the loss a copy of it, x.clone()"
            )


kl_divergence = rowwise(kl_and_gradient)
