"""Runs functions of rows: with masks, in blocks or compiled, in any precision, and with a gradient."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.nn import Parameter
from torch.utils._triton import has_triton

from kdtorch._numerics import BLOCK, eager_on_cpu, kl_and_gradient, no_autocast, pack, widest
from kdtorch._reduce import zero_masked, zeroed
from kdtorch._typing import ProcessGroup

Input = Any  # a tensor or a number
Setting = bool | Literal["auto"]

# the devices on which "auto" fuses; "cuda" is added once `benchmarks/gpu.sh` has shown that it is correct and faster
# there
_AUTO: frozenset[str] = frozenset()
_SETTINGS: dict[str, Setting] = {"1": True, "0": False, "auto": "auto"}
_setting: Setting = "auto"


def fuse(setting: Setting) -> Setting:
    """Set whether losses of single examples run as one compiled kernel, which is called from eager PyTorch.

    A loss that works row by row is then compiled by `torch.compile` at its first call, and called from eager code. It
    reads half-precision inputs as they are and writes the gradient in their dtype, while eager PyTorch on a GPU makes
    float32 copies of the logits. The results are the same up to rounding. The setting applies to the whole process from
    the next call on. At import it is set by the environment variable `KDLOSSES_FUSE`: `1`, `0` or `auto`.

    Args:
        setting: True, False, or `"auto"`, the default, which is meant for CUDA devices that have Triton. Correctness
            and speed have not been measured there yet; until then `"auto"` never fuses.

    Returns:
        The previous setting.

    Raises:
        ValueError: another setting.

    Known limits:

    - Losses that compare examples with each other, and `dcn_loss`, do not work row by row and are not fused.
    - The first call of a loss takes seconds, and needs what `torch.compile` needs: Triton on a GPU, and a C++ compiler.
    - One compiled program works for all sizes, settings and leading axes. A batch of one row, a mask, another dtype, a
      call without a gradient, and logits that are slices of a larger array need a program of their own. PyTorch
      compiles at most eight programs for one loss, dtype and mask, and then runs the function uncompiled.
    - A call takes about 50 µs more before its kernel starts, so eager PyTorch is faster for small batches.
    - Second derivatives, the transforms of `torch.func`, tensors of a subclass such as `DTensor`, calls under a
      `TorchDispatchMode`, and a row without a batch axis are not fused. Under `torch.compile`, a loss is compiled
      together with the code around it.

    >>> import torch
    >>> import kdtorch
    >>> before = kdtorch.fuse(False)
    >>> kdtorch.fuse(before)
    False
    """
    global _setting
    if not (isinstance(setting, bool) or setting == "auto"):
        raise ValueError(f'`setting` must be one of True, False, "auto", got {setting!r}')
    before, _setting = _setting, setting
    return before


try:
    fuse(_SETTINGS[os.environ.get("KDLOSSES_FUSE", "auto")])
except KeyError as error:
    raise ValueError(f"KDLOSSES_FUSE must be one of {', '.join(_SETTINGS)}, got {error}") from None


def rowwise(value_and_gradient: Callable[..., tuple[Tensor, Tensor]], axes: int = 1) -> Callable[..., Tensor]:
    """Make a differentiable function of rows from one that returns their values and gradients.

    The gradient is that with respect to the first argument. The value of a row depends on that row alone. The first
    argument is `[*batch, n]`, or has `axes` axes after those of the batch. The others are constant: `[*batch, ...]`, or
    numbers; a number that is a tensor and requires a gradient gets one. The function that is returned takes the inputs
    in any precision, and a mask of the batch, `where=`. With `class_group=`, which is passed on, each rank has a part
    of every row and returns the value of the whole row.

    Until the backward pass only the gradient is stored, in the dtype of the first argument, and nothing of the inputs,
    which may be changed in place or come from `torch.inference_mode()`. Only a second derivative needs the inputs
    unchanged.
    """

    def over(class_group: ProcessGroup | None) -> Callable[..., tuple[Tensor, Tensor]]:
        return (
            value_and_gradient
            if class_group is None
            else functools.partial(value_and_gradient, class_group=class_group)
        )

    def with_slopes(
        class_group: ProcessGroup | None, learned: Sequence[int], x: Tensor, *others: Input
    ) -> tuple[Tensor, ...]:
        """The value, its gradient, and its derivative with respect to each of the numbers that have one."""
        evaluate = over(class_group)
        if not learned:
            return evaluate(x, *others)

        def slope(i: int) -> Tensor:
            def value(number: Tensor) -> Tensor:
                return evaluate(x, *others[:i], number, *others[i + 1 :])[0]

            if not torch.compiler.is_compiling():
                _load_forward_mode()
            return torch.func.jvp(value, (others[i],), (torch.ones_like(others[i]),))[1]

        return *evaluate(x, *others), *map(slope, learned)

    def parts(
        class_group: ProcessGroup | None, dtype: torch.dtype | None, learned: Sequence[int], *inputs: Input
    ) -> tuple[Tensor, ...]:
        """The value and, unless `dtype` is None, the derivatives to store; `dtype` is that of the first argument."""
        if dtype is None:
            return over(class_group)(*inputs)[:1]
        value, gradient, *slopes = with_slopes(class_group, learned, *inputs)
        return value, *pack(gradient, dtype, axes), *slopes

    parts.__name__ = getattr(value_and_gradient, "__name__", "parts")

    class Rowwise(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(
            check: Callable[[], None] | None,
            class_group: ProcessGroup | None,
            learned: Sequence[int],
            where: Tensor | None,
            x: Tensor,
            *others: Input,
        ) -> tuple[Tensor, ...]:
            return by_rows(parts, where, x, *others, axes=axes, fixed=(class_group, x.dtype, learned))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            ctx.check, ctx.class_group, ctx.learned, *given = inputs
            held = output[1:]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*held)
            ctx.held = len(held)
            if torch.compiler.is_compiling():  # there is no second derivative
                ctx.save_for_backward(*held)
            elif torch._C._are_functorch_transforms_active():
                ctx.save_for_backward(*held, *(_saveable(v) for v in given if isinstance(v, Tensor)))
                ctx.given = [None if isinstance(v, Tensor) else (v,) for v in given]
            else:
                ctx.save_for_backward(*held)
                ctx.given = [(v,) for v in given]

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
            asked, saved = ctx.needs_input_grad[4:], ctx.saved_tensors
            result: list[Tensor | None] = [None] * len(asked)
            if cotangent is not None:
                above = cotangent
                for _ in range(axes):
                    above = above.unsqueeze(-1)
                held: list[Tensor] = list(saved[: ctx.held])
                slopes = held[ctx.held - len(ctx.learned) :]
                if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                    where, *inputs = _as_they_were(ctx, saved[ctx.held :])
                    with no_autocast(cotangent):
                        gradient, *slopes = with_slopes(ctx.class_group, ctx.learned, *_wide(where, *inputs))[1:]
                    result[0] = (above * gradient).to(inputs[0].dtype)
                elif asked[0]:
                    result[0] = _scaled(above, *held[: ctx.held - len(slopes)], axes=axes)
                for i, slope in zip(ctx.learned, slopes, strict=True):
                    result[1 + i] = (cotangent * slope).sum()
            return None, None, None, None, *result

    # `apply` binds its arguments to the signature first, which in eager code takes longer than a kernel
    Rowwise.forward.__signature__ = inspect.signature(Rowwise.forward)  # type: ignore[attr-defined]
    apply_in_eager = super(torch.autograd.Function, Rowwise).apply

    def value(
        x: Tensor, *others: Input, where: Tensor | None = None, class_group: ProcessGroup | None = None
    ) -> Tensor:
        traced, learned, inputs = torch.is_grad_enabled(), [], [x]
        for i, v in enumerate(others):
            if _has_rows(v):
                v = v.detach()  # also because a compiler does not accept the same tensor twice
            elif traced and isinstance(v, Tensor) and v.requires_grad:
                learned.append(i)
            inputs.append(v)
        with no_autocast(x):
            if not (learned or (traced and x.requires_grad)):
                return by_rows(parts, where, *inputs, axes=axes, fixed=(class_group, None, ()))[0]
            if torch.compiler.is_compiling():
                if learned and class_group is not None:
                    raise NotImplementedError(
                        "under torch.compile a temperature has no gradient with `class_group`; give temperature.detach(), or "
                        "call the loss outside of what is compiled, by torch.compiler.disable"
                    )
                return Rowwise.apply(None, class_group, tuple(learned), where, *inputs)[0]
            apply = Rowwise.apply if torch._C._are_functorch_transforms_active() else apply_in_eager
            return apply(_check_of((where, *inputs)), class_group, tuple(learned), where, *inputs)[0]

    return value


def by_rows(
    function: Callable[..., tuple[Tensor, ...]],
    where: Tensor | None,
    x: Tensor,
    *others: Input,
    axes: int = 1,
    fixed: tuple[Hashable, ...] = (),
) -> tuple[Tensor, ...]:
    """Apply a function to the rows of x and of the others, in float32 or wider; its results for masked rows become 0.

    On a CPU the function gets only the kept rows, in blocks that fit into the caches, so that inputs in half precision
    are never copied as a whole. Elsewhere, and if `fuse` is on, it gets all rows, with 0 in the masked ones. The
    `fixed` arguments come first. If the first of them is a process group, the function also gets all rows, because all
    ranks must send equal amounts.
    """
    if fixed and fixed[0] is not None:
        return function(*fixed, *_wide(where, x, *others))
    if x.ndim > axes and _fuses(x, *others):
        return _compiled(function, fixed, where, x, *others, axes=axes)
    small = x.numel() < 4 * BLOCK
    if (where is None and small) or x.ndim == axes or not eager_on_cpu(x, *others):
        return function(*fixed, *_wide(where, x, *others))
    batch = x.shape[: x.ndim - axes]
    rows = [v.reshape(-1, *v.shape[len(batch) :]) if _has_rows(v) else v for v in (x, *others)]
    number = len(rows[0])
    kept = None if where is None else where.reshape(-1).nonzero().squeeze(-1)
    if kept is not None and len(kept) == number:
        kept = None
    size = max(number if small else BLOCK * number // x.numel(), 1)
    results: list[Tensor] = []
    for start in range(0, max(number if kept is None else len(kept), 1), size):
        block = slice(start, start + size) if kept is None else kept[start : start + size]
        parts = function(*fixed, *_wide(None, *(_rows(v, block) if _has_rows(v) else v for v in rows)))
        if not results:
            results = [_room(part, x, batch, kept is not None) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result.view(number, *part.shape[1:])[block] = part
    return tuple(results)


def _rows(x: Tensor, places: slice | Tensor) -> Tensor:
    return (
        x[places] if isinstance(places, slice) else x.index_select(0, places)
    )  # takes a fifth of the time of x[places]


def _fuses(x: Tensor, *others: Input) -> bool:
    """Whether a row function is compiled and called from eager code; it must have ordinary tensors with at least one entry."""
    if torch.compiler.is_compiling() or not _setting:
        return False
    if _setting == "auto" and not (x.device.type in _AUTO and has_triton()):
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (x, *others)):
        return False  # needed for the derivative of a derivative
    return x.numel() > 0 and not x.is_meta and _is_ordinary(x, *others)


def _is_ordinary(*inputs: Input) -> bool:
    """Whether all tensors are plain ones: no subclass, and no batched gradient of `torch.autograd.grad`."""
    tensors = [v for v in inputs if isinstance(v, Tensor)]
    return not any(
        type(v) not in (Tensor, Parameter) or torch._C._functorch.is_legacy_batchedtensor(v) for v in tensors
    )


def _compiled(
    function: Callable[..., tuple[Tensor, ...]],
    fixed: tuple[Hashable, ...],
    where: Tensor | None,
    x: Tensor,
    *others: Input,
    axes: int,
) -> tuple[Tensor, ...]:
    """The results of the compiled function for all rows; there is one program for any number of leading axes."""
    batch = x.shape[: x.ndim - axes]
    inputs = [v.detach() if isinstance(v, Tensor) else v for v in (where, x, *others)]
    flat = len(batch) != 1
    if flat:
        try:
            inputs = [v.view(-1, *v.shape[len(batch) :]) if _has_rows(v) else v for v in inputs]
        except RuntimeError:  # the rows are not at regular steps in memory
            flat = False
    masked = inputs[0] is not None
    with _unequal_sizes(), torch.no_grad():
        results = _program(function, fixed, masked)(*inputs)
    # not views, so that users may write into them
    return tuple(torch.ops.aten._unsafe_view(part, batch + part.shape[1:]) for part in results) if flat else results


@functools.cache
def _program(
    function: Callable[..., tuple[Tensor, ...]], fixed: tuple[Hashable, ...], masked: bool
) -> Callable[..., tuple[Tensor, ...]]:
    """A function of rows and its fixed arguments under `torch.compile`, for all sizes, and with a mask or without."""

    def program(where: Tensor | None, *inputs: Input) -> tuple[Tensor, ...]:
        wide = _wide(None, *inputs)
        if where is not None:
            wide = [zeroed(where, v)[0] if _has_rows(v) else v for v in wide]
        return function(*fixed, *wide)

    # torch.compile counts recompilations per code object, so each function gets its own
    program.__code__ = program.__code__.replace(co_name=function.__name__)
    return torch.compile(program, dynamic=True)


_tracing = threading.RLock()


@contextlib.contextmanager
def _unequal_sizes() -> Iterator[None]:
    """Sizes that are equal at the first call, as for a square array of logits, may differ at the next call."""
    with _tracing:
        before, _config.use_duck_shape = _config.use_duck_shape, False
        try:
            yield
        finally:
            _config.use_duck_shape = before


def _room(part: Tensor, x: Tensor, batch: torch.Size, zero: bool) -> Tensor:
    """An empty tensor, or one of zeros, for the results of all rows.

    If it has the shape of x, it also has the memory layout of x. It is not a view, so users may write into it.
    """
    if len(batch) == 1 and part.shape[1:] == x.shape[1:]:
        return (torch.zeros_like if zero else torch.empty_like)(x, dtype=part.dtype)
    return (part.new_zeros if zero else part.new_empty)(batch + part.shape[1:])


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _wide(where: Tensor | None, *inputs: Input) -> list[Any]:
    """The inputs in float32 or wider, with 0 in the masked rows."""
    dtype = widest(*(v for v in inputs if _has_rows(v)))
    wide: list[Any] = list(inputs)
    for i, v in enumerate(inputs):
        if _has_rows(v):
            v = v.to(dtype) if v.dtype != dtype and v.is_floating_point() else v
            wide[i] = v if where is None else zero_masked(where, v)[0]
    return wide


def _scaled(above: Tensor, gradient: Tensor, unit: Tensor | None = None, *, axes: int) -> Tensor:
    """The cotangent times a packed gradient; in place if the gradient is large and no other backward pass needs it."""
    if unit is not None:
        above = above * unit
    if (
        torch.compiler.is_compiling()
        or gradient.numel() <= BLOCK
        or torch._C._are_functorch_transforms_active()
        or not _is_ordinary(above, gradient)
    ):
        return (above * gradient).to(gradient.dtype)
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    result = torch.empty_like(gradient) if keep else gradient
    blocks: Sequence[tuple[Tensor, ...]] = [(gradient, above, result)]
    if gradient.is_cpu and gradient.dtype != above.dtype:  # all of it would be copied at once
        longest = max(range(gradient.ndim - axes), key=gradient.shape.__getitem__, default=0)
        size = max(BLOCK * gradient.shape[longest] // gradient.numel(), 1)
        blocks = list(zip(*(x.expand_as(gradient).split(size, longest) for x in blocks[0]), strict=True))
    for part, factor, place in blocks:
        torch.mul(part, factor, out=place)
    return result


@functools.cache
def _load_forward_mode() -> None:
    """Load PyTorch's forward-mode differentiation, which at its first use warns about PyTorch's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def _saveable(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


def _check_of(given: Sequence[Any]) -> Callable[[], None]:
    """A check that raises if a tensor has been changed in place since; tensors of inference mode cannot be checked."""
    tensors = [_innermost(v) for v in given if isinstance(v, Tensor)]
    versions = [(x, x._version) for x in tensors if not x.is_inference()]

    def check() -> None:
        for x, version in versions:
            if x._version != version:
                raise RuntimeError(
                    "the second derivative of a loss, and under torch.func the first, needs the original inputs of the loss, "
                    f"but the one of shape {list(x.shape)} was changed in place; compute the derivatives before the change, or "
                    "give the loss a copy, x.clone()"
                )

    return check


def _innermost(x: Tensor) -> Tensor:
    """The tensor inside the wrappers of the transforms of `torch.func`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _as_they_were(ctx: Any, saved: Sequence[Tensor]) -> list[Any]:
    """The inputs of the forward pass: saved tensors under a transform of `torch.func`, else references to them."""
    ctx.check()
    if saved:
        tensors = iter(saved)
        return [next(tensors) if v is None else v[0] for v in ctx.given]
    return [_saveable(v) if isinstance(v, Tensor) else v for (v,) in ctx.given]


kl_divergence = rowwise(kl_and_gradient)
