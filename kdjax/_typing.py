"""What the public functions take, and the check of it at their boundary."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import jax
import numpy as np
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import Bool, Float, Integer, jaxtyped

__all__ = ["Array", "AxisName", "Bool", "Float", "Integer", "Reduction", "Scalar", "checked", "describe"]

if TYPE_CHECKING:
    Array = jax.Array
    Number = float
else:  # as JAX's own functions do, take NumPy's arrays and numbers too
    Array = jax.Array | np.ndarray
    Number = numbers.Real
Reduction = Literal["mean", "sum", "none"]
Scalar = Number | Float[Array, ""]
AxisName = str | tuple[str, ...]

_CHECK = os.environ.get("KDLOSSES_CHECK") != "0"
_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float
_MEND = {"torch": "give kdjax jnp.from_dlpack(x.detach())"}
_F = TypeVar("_F", bound=Callable[..., Any])


def checked(function: _F) -> _F:
    """Check every argument against its annotation, one after the other; under `jit` this costs nothing.

    With the environment variable `KDLOSSES_CHECK=0` at import the function stays as it is.
    """
    if not _CHECK:
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(_flat(function, signature.bind(*args, **kwargs).arguments))
        with jaxtyped("context"):  # binds the names of the axes from one argument to the next
            for name, (value, hint, _) in given.items():
                # a choice among texts is checked where it is made, which names them
                if get_origin(hint) is not Literal and not is_bearable(value, hint, conf=_CONF):
                    raise TypeError(_explain(function.__name__, name, given))
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


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
    message = f"{function}: `{name}` must be {text}, got {describe(value)}"
    before = list(given)[: list(given).index(name)]
    beside = [f"{k} {describe(given[k][0])}" for k in before if hasattr(given[k][0], "shape")]
    message += f" beside {', '.join(beside)}" if beside else ""
    mend = _mend(name, value, text, given)
    return message + (f"; {mend}" if mend else "")


def _mend(name: str, value: Any, text: str, given: dict[str, tuple[Any, Any, str]]) -> str | None:
    """What to write instead, where the mistake is a known one."""
    if not isinstance(value, Array):
        return _MEND.get(type(value).__module__.partition(".")[0])
    if text.startswith("Sequence"):
        return f"give [{name}]"
    arrays = {k: v for k, (v, _, _) in given.items() if isinstance(v, Array)}
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
        text = f"{value.dtype}[{', '.join(map(str, value.shape))}]".replace("torch.", "")
        return text if isinstance(value, Array) else f"{type(value).__module__.partition('.')[0]} {text}"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
