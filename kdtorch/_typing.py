"""The types that public functions take, and the check of their arguments."""

from __future__ import annotations

import contextlib
import functools
import numbers
import operator
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.distributed import ProcessGroup

from kdlosses import checks
from kdtorch._collectives import check_dtensors

__all__ = [
    "Bool",
    "Float",
    "Integer",
    "ProcessGroup",
    "Reduction",
    "Scalar",
    "Tensor",
    "checked",
    "describe",
    "rounds",
    "sizes",
]

if TYPE_CHECKING:
    Number = float
else:  # NumPy's numbers are accepted too
    Number = numbers.Real
Reduction = Literal["mean", "sum", "none"]
Scalar = Number | Tensor

_CHECK = os.environ.get("KDLOSSES_CHECK") != "0"
_F = TypeVar("_F", bound=Callable[..., Any])
_Leaves = list[tuple[str, Any, checks.Argument]]


def sizes(x: Tensor) -> list[int]:
    """The shape for the text of an error; the symbols that `torch.compile` traces become numbers."""
    return [operator.index(n) for n in x.shape]


def _smallest(x: Tensor) -> int | None:
    try:
        return None if torch.compiler.is_compiling() else int(x.min())
    except RuntimeError:  # no entries or no data, or inside vmap
        return None


_TORCH = checks.Framework(
    arrays=(Tensor,),
    foreign={
        "numpy": "give kdtorch torch.as_tensor(x)",
        "jax": "give kdtorch torch.from_dlpack(x)",
        "jaxlib": "give kdtorch torch.from_dlpack(x)",
    },
    sizes=sizes,
    smallest=_smallest,
    device=lambda x: str(x.device),
)
describe = functools.partial(checks.describe, arrays=_TORCH.arrays)


def _constant(function: _F) -> _F:
    """Let `torch.compile` call a function of constants and use its result, instead of tracing the function.

    It does what `torch.compiler.assume_constant_result` does, whose first use would take seconds to import the
    compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_constant(checks.explain), _constant(checks.misfit)


if TYPE_CHECKING:

    @overload
    def checked(function: _F) -> _F: ...

    @overload
    def checked(
        *, learns: tuple[str, ...] = (), dtensor: Literal["rows", "any"] | None = None
    ) -> Callable[[_F], _F]: ...


def checked(
    function: _F | None = None, *, learns: tuple[str, ...] = (), dtensor: Literal["rows", "any"] | None = None
) -> _F | Callable[[_F], _F]:
    """Check every argument against its annotation, one after another, and disable autocast, which would round products.

    A call whose arguments have the types, dtypes, shapes and devices of an earlier call that passed is not checked
    again. `torch.compile` checks while it traces, which costs nothing later. With the environment variable
    `KDLOSSES_CHECK=0` at import nothing is checked, and only autocast is disabled.

    Args:
        learns: the arguments that have a gradient; by default the first and `temperature`. If another tensor requires a
            gradient and the first does not, a warning says that it gets none; a number that requires one is an error.
        dtensor: `"any"` if PyTorch's operators compute the loss for DTensors with any sharding, `"rows"` if the last
            axis must not be sharded.
    """
    if function is None:
        return functools.partial(checked, learns=learns, dtensor=dtensor)
    read, types = checks.read(function)
    learned = learns or (read.names[0], "temperature")
    accepted: set[Any] = set()

    @_constant  # so that torch.compile keeps no guard for it
    def kdlosses_plan() -> checks.Plan:
        return read

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Check a call; whether the next call of the same kind can skip the check."""
        plan = kdlosses_plan()
        leaves = checks.check(plan, types, _TORCH, args, kwargs)
        if torch.is_grad_enabled():
            _check_gradients(plan.function, leaves, learned)
        return not check_dtensors(plan.function, leaves, dtensor)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if _CHECK:
                check(args, kwargs)
            return function(*args, **kwargs)
        if _CHECK:
            values = kwargs.values()
            key = *map(_kind, args), *kwargs, *map(_kind, values), torch.is_grad_enabled()
            try:
                known = key in accepted and torch._C._functorch.maybe_current_level() is None
            except TypeError:  # the sizes are symbols
                key, known = (), False
            if not known and check(args, kwargs) and len(accepted) < 1000:
                accepted.add(key)
        if torch._C._is_any_autocast_enabled():
            return _without_autocast(function, args, kwargs)
        return function(*args, **kwargs)

    # torch.compile counts recompilations per code object, so each loss gets its own
    call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return call


def _kind(value: Any) -> Any:
    """Everything that the check of an argument depends on."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape, value.device, value.requires_grad
    return (type(value), *map(_kind, value)) if isinstance(value, tuple | list) else type(value)


def _without_autocast(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = [*args, *kwargs.values()]
    values += [item for value in values if isinstance(value, tuple | list) for item in value]
    with contextlib.ExitStack() as stack:
        for device in {value.device.type for value in values if isinstance(value, Tensor)}:
            if rounds(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        return function(*args, **kwargs)


def rounds(device: str) -> bool:
    """Whether autocast is on for a device; "meta", the device of tensors without data, has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _check_gradients(function: str, leaves: _Leaves, learned: tuple[str, ...]) -> None:
    """Raise an error if a setting requires a gradient, and warn if a tensor requires one and the first one does not."""
    lost, first = "", False
    for path, value, argument in leaves:
        if not isinstance(value, Tensor) or not _differentiated(value):
            continue
        name = path.partition("[")[0]
        if name == learned[0]:
            first = True
        if name in learned or "." in name:  # a state is never trained
            continue
        if argument.forms[0].kind == "Scalar":
            raise ValueError(
                f"{function}: `{name}` is a constant and gets no gradient, got a tensor that requires one; give {name}.detach()"
            )
        lost = lost or name
    if lost and not first:
        _warn(function, lost, learned[0])


def _differentiated(x: Tensor) -> bool:
    """Whether autograd or a transform of torch.func needs a gradient."""
    if torch.compiler.is_compiling():
        return x.requires_grad or (not x.ndim and x.view_as(x).requires_grad)  # the latter respects transforms
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if x.requires_grad:
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


_warned: set[str] = set()


@_constant
def _warn(function: str, name: str, first: str) -> None:
    if function in _warned:
        return
    _warned.add(function)
    warnings.warn(
        f"{function}: `{name}` requires a gradient but gets none, because it is a constant of this loss, and `{first}` requires none; "
        f"swap the two arguments, use a loss that has this gradient, or give {name}.detach()",
        stacklevel=5,
    )
