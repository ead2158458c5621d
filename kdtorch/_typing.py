"""What the public functions take, and the check of it at their boundary."""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import Bool, Float, Integer, jaxtyped
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["Bool", "Float", "Integer", "ProcessGroup", "Reduction", "Scalar", "Tensor", "checked", "describe", "rounds"]

if TYPE_CHECKING:
    Number = float
else:  # NumPy's numbers too
    Number = numbers.Real
Reduction = Literal["mean", "sum", "none"]
Scalar = Number | Float[Tensor, ""]

_CHECK = os.environ.get("KDLOSSES_CHECK") != "0"
_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float
_MEND = {"numpy": "give kdtorch torch.as_tensor(x)", "jax": "give kdtorch torch.from_dlpack(x)"}
_MEND["jaxlib"] = _MEND["jax"]
_F = TypeVar("_F", bound=Callable[..., Any])


def checked(function: _F) -> _F:
    """Check every argument against its annotation, one after the other, and leave autocast, which would round products.

    `torch.compile` passes the check by, and so does a call whose arguments are of the types, dtypes and shapes of one that
    passed. With the environment variable `KDLOSSES_CHECK=0` at import there is no check, and autocast alone is looked at.
    """
    signature = inspect.signature(function)
    accepted: set[Any] = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (_CHECK or torch._C._is_any_autocast_enabled()):
            return function(*args, **kwargs)
        key: Any = _kind(args), tuple(kwargs), _kind(tuple(kwargs.values()))
        if key in accepted:
            return function(*args, **kwargs)
        given = dict(_flat(function, signature.bind(*args, **kwargs).arguments))
        with jaxtyped("context"):  # binds the names of the axes from one argument to the next
            for name, (value, hint, _) in given.items() if _CHECK else ():
                # a choice among texts is checked where it is made, which names them
                if get_origin(hint) is not Literal and not is_bearable(value, hint, conf=_CONF):
                    raise TypeError(_explain(function.__name__, name, given))
        devices = {value.device.type for value, _, _ in given.values() if isinstance(value, Tensor)}
        rounding = [device for device in devices if rounds(device)]
        if not rounding and len(accepted) < 1000:
            accepted.add(key)
        with contextlib.ExitStack() as stack:
            for device in rounding:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    # torch.compile counts recompilations by code object: one each, not one for all losses
    call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _kind(value: Any) -> Any:
    """All that the check of an argument depends on."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, rounds(value.device.type)
    return (type(value), *map(_kind, value)) if isinstance(value, tuple | list) else type(value)


def rounds(device: str) -> bool:
    """Whether autocast is on there; the device of tensors without data knows no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)


@functools.cache
def _hints(annotated: Any) -> dict[str, tuple[Any, str]]:
    evaluated = get_type_hints(annotated)
    texts = inspect.get_annotations(annotated).items()
    return {name: (evaluated[name], str(getattr(text, "__forward_arg__", text))) for name, text in texts}


def _flat(function: Any, arguments: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any, str]]]:
    """The arguments, and the fields of those that are states, each with its annotation."""
    for name, value in arguments.items():
        hint, text = _hints(function)[name]
        if get_origin(hint) is Sequence and isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield f"{name}[{i}]", (item, get_args(hint)[0], text.removeprefix("Sequence[").removesuffix("]"))
            continue
        yield name, (value, hint, text)
        if isinstance(value, tuple) and isinstance(hint, type) and isinstance(value, hint):
            for field, (inner, inner_text) in _hints(hint).items():
                yield f"{name}.{field}", (getattr(value, field), inner, inner_text)


def _explain(function: str, name: str, given: dict[str, tuple[Any, Any, str]]) -> str:
    value, _, text = given[name]
    if text == "Scalar":
        return f"{function}: `{name}` must be a number or a floating-point array of shape [], got {describe(value)}"
    message = f"{function}: `{name}` must be {text.replace('Tensor', 'Array')}, got {describe(value)}"
    before = list(given)[: list(given).index(name)]
    beside = [f"{k} {describe(given[k][0])}" for k in before if hasattr(given[k][0], "shape")]
    message += f" beside {', '.join(beside)}" if beside else ""
    mend = _mend(name, value, text, given)
    return message + (f"; {mend}" if mend else "")


def _mend(name: str, value: Any, text: str, given: dict[str, tuple[Any, Any, str]]) -> str | None:
    """What to write instead, where the mistake is a known one."""
    if not isinstance(value, Tensor):
        return _MEND.get(type(value).__module__.partition(".")[0])
    if text.startswith("Sequence"):
        return f"give [{name}]"
    arrays = {k: v for k, (v, _, _) in given.items() if isinstance(v, Tensor)}
    first, like = next(iter(arrays.items()))
    floating, shape, likes = "float" in str(value.dtype), tuple(value.shape), tuple(like.shape)
    if shape == (*likes[:-1], 1) and not text.startswith("Float"):
        return f"give {name}[..., 0]"
    if text.startswith("Bool"):
        return None if "bool" in str(value.dtype) else f"give {name} != 0"
    if text.startswith("Integer"):
        return (
            f"give {name}.argmax(-1)"
            if floating and shape == likes
            else f"cast {name} to integers"
            if floating
            else None
        )
    if not floating:
        return f"the order of the arrays is {', '.join(arrays)}"
    if len(shape) > 2 and "'batch " in text and len(text.split("'")[1].split()) == 2:
        return f"give {name}.reshape(-1, {shape[-1]})"
    if name.startswith("state."):
        return f"make a state of width {likes[-1]}"
    if name == first or not shape:
        return None
    if "classes" in text and shape[:-1] == likes[:-1]:
        wider, (few, many) = name if shape[-1] > likes[-1] else first, sorted((shape[-1], likes[-1]))
        return f"{wider} has {many - few} classes more; if they are padding, cut them off: {wider}[..., :{few}]"
    if "batch" in text and shape[1:] == likes[1:]:
        return "give both the same examples"
    return None


def describe(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        text = f"{value.dtype}[{', '.join(map(str, value.shape))}]".removeprefix("torch.")
        return text if isinstance(value, Tensor) else f"{type(value).__module__.partition('.')[0]} {text}"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
