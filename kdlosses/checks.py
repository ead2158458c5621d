"""The check of a public function's arguments: from annotations and what came to an error that says how to mend it.

It imports neither framework. `check` and what it calls, down to `Came`, are also traced by `torch.compile`, so that they
are plain; the texts are made by `misfit` and `explain`, which take constants alone and are not traced.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

_ARRAYS = {"Float": "float", "Integer": "int", "Bool": "bool"}  # of an annotation: what the name of its dtypes holds


class Form(NamedTuple):
    """One of the things that an argument may be.

    Attributes:
        kind: `"Float"`, `"Integer"` or `"Bool"`, an array; `"Scalar"`, a number or an array of one; `"Sequence"`; `"bool"`;
            `"int"`; `"None"`; `"any"`, a choice among texts, which is checked where it is made; or the name of a type.
        axes: of an array, the names of its axes: `*name` for any number of them, `_` for one of any size.
    """

    kind: str
    axes: tuple[str, ...] = ()


class Argument(NamedTuple):
    """A parameter, the item of a sequence, or the field of a state: its name, its annotation as an error says it, and
    what it may be. `inner` is what a sequence or a state holds.
    """

    name: str
    text: str
    forms: tuple[Form, ...]
    inner: tuple[Argument, ...] = ()


class Plan(NamedTuple):
    """What a function takes."""

    function: str
    arguments: tuple[Argument, ...]
    positional: tuple[str, ...]
    names: tuple[str, ...]
    required: tuple[str, ...]


class Came(NamedTuple):
    """What came for an argument.

    Attributes:
        path: the argument, or the item or field of it: `state.center`.
        expected: its annotation.
        got: its description, without its shape.
        shape: of an array, whoever's.
        dtype: of an array of this framework; "" of all else.
        mend: what to write instead, as far as what came says so by itself.
    """

    path: str
    expected: str
    got: str
    shape: tuple[int, ...] | None
    dtype: str
    mend: str


class Side(NamedTuple):
    """What the check of one package knows of its framework.

    Attributes:
        arrays: the types of its arrays.
        foreign: of the other arrays' modules, how to bring them here.
        sizes: the shape of an array, as numbers.
        smallest: the smallest entry of an array, or None where it cannot be asked.
        device: where an array is, or None where that is free.
    """

    arrays: tuple[type, ...]
    foreign: Mapping[str, str]
    sizes: Callable[[Any], Sequence[int]]
    smallest: Callable[[Any], int | None]
    device: Callable[[Any], str | None]


def read(function: Callable[..., Any]) -> tuple[Plan, dict[str, Any]]:
    """What a function takes, from its annotations, and the types that they name."""
    parameters, types = inspect.signature(function).parameters, {}
    scope = function.__globals__  # type: ignore[attr-defined]
    plan = Plan(
        function.__name__,
        tuple(_argument(name, function.__annotations__[name], scope, types) for name in parameters),
        tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD),
        tuple(parameters),
        tuple(name for name, p in parameters.items() if p.default is p.empty),
    )
    return plan, types


def _argument(name: str, annotation: Any, scope: dict[str, Any], types: dict[str, Any]) -> Argument:
    text = getattr(annotation, "__forward_arg__", annotation)
    inner: list[Argument] = []
    forms = tuple(_forms(ast.parse(text, mode="eval").body, scope, types, inner))
    return Argument(name, text.replace("Tensor", "Array"), forms, tuple(inner))


def _forms(node: ast.expr, scope: dict[str, Any], types: dict[str, Any], inner: list[Argument]) -> list[Form]:
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return _forms(left, scope, types, inner) + _forms(right, scope, types, inner)
        case ast.Subscript(ast.Name(kind), ast.Tuple([_, ast.Constant(axes)])) if kind in _ARRAYS:
            return [Form(kind, tuple(axes.split()))]
        case ast.Subscript(ast.Name("Sequence"), item):
            inner.append(_argument("", ast.unparse(item), scope, types))
            return [Form("Sequence")]
        case ast.Constant(None):
            return [Form("None")]
        case ast.Name("Scalar" | "bool" | "int" as name):
            return [Form(name)]
    hint = eval(ast.unparse(node), scope)
    if get_origin(hint) is Literal:
        return [Form("any")]
    name = ast.unparse(node)
    types[name] = tuple(get_origin(x) or x for x in get_args(hint) or (hint,))
    if issubclass(types[name][0], tuple):  # a state
        module = vars(sys.modules[hint.__module__])
        inner += [_argument(field, text, module, types) for field, text in hint.__annotations__.items()]
    return [Form(name)]


def check(
    plan: Plan, types: dict[str, Any], side: Side, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Any, Argument]]:
    """An error that says how to mend it, or all arguments with the items and fields of them."""
    given = _bound(plan, args, kwargs)
    if given is None:
        raise TypeError(misfit(plan.function, plan.positional, plan.names, plan.required, len(args), tuple(kwargs)))
    leaves = _leaves(plan, types, given)
    sizes: dict[str, Any] = {}
    for path, value, argument in leaves:
        if not _fits(value, argument.forms, types, side.arrays, sizes):
            everything = tuple([_came(x, y, a, side) for x, y, a in leaves])
            raise TypeError(explain(plan.function, path, everything))
    _check_devices(plan.function, leaves, side)
    return leaves


def _bound(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name, or None where they are not the function's."""
    if len(args) > len(plan.positional):
        return None
    given = dict(zip(plan.positional, args, strict=False))
    for name, value in kwargs.items():
        if name in given or name not in plan.names:
            return None
        given[name] = value
    for name in plan.required:
        if name not in given:
            return None
    return given


def _leaves(plan: Plan, types: dict[str, Any], given: dict[str, Any]) -> list[tuple[str, Any, Argument]]:
    leaves = []
    for argument in plan.arguments:
        if argument.name not in given:
            continue
        value, kind = given[argument.name], argument.forms[0].kind
        leaves.append((argument.name, value, argument))
        if not len(argument.inner):
            continue
        if kind == "Sequence":
            if isinstance(value, (list, tuple)):  # noqa: UP038  # as every version of PyTorch traces it
                for i, item in enumerate(value):
                    leaves.append((f"{argument.name}[{i}]", item, argument.inner[0]))
        elif isinstance(value, types[kind]):
            for field in argument.inner:
                leaves.append((f"{argument.name}.{field.name}", getattr(value, field.name), field))
    return leaves


def _fits(
    value: Any, forms: tuple[Form, ...], types: dict[str, Any], arrays: tuple[type, ...], sizes: dict[str, Any]
) -> bool:
    for form in forms:
        kind = form.kind
        if kind in _ARRAYS:
            fits = (
                isinstance(value, arrays)
                and _ARRAYS[kind] in str(value.dtype)
                and _axes_fit(value.shape, form.axes, sizes)
            )
        elif kind == "None":
            fits = value is None
        elif kind == "Scalar":
            if isinstance(value, arrays):
                fits = len(value.shape) == 0 and ("float" in str(value.dtype) or "int" in str(value.dtype))
            else:
                fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        elif kind == "Sequence":
            fits = isinstance(value, (list, tuple))  # noqa: UP038
        elif kind == "bool":
            fits = isinstance(value, bool)
        elif kind == "int":
            fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        else:
            fits = kind == "any" or isinstance(value, types[kind])
        if fits:
            return True
    return False


def _axes_fit(shape: tuple[Any, ...], axes: tuple[str, ...], sizes: dict[str, Any]) -> bool:
    """Whether a shape has these axes, each of the size that it had before; binds the names that are new, if so."""
    free = len(shape) - len(axes)
    parts = [*shape]
    if len(axes) and axes[0][0] == "*":
        free += 1
        parts = [tuple(shape[:free]), *shape[free:]] if free >= 0 else parts
    elif free > 0:
        return False
    if free < 0:
        return False
    new = {}
    for name, size in zip(axes, parts, strict=True):
        if name != "_":
            if name in sizes and sizes[name] != size:
                return False
            new[name] = size
    sizes.update(new)
    return True


def _check_devices(function: str, leaves: list[tuple[str, Any, Argument]], side: Side) -> None:
    first, device = "", None
    for path, value, argument in leaves:
        if argument.text == "Scalar" or "." in path or not isinstance(value, side.arrays):  # these are brought along
            continue
        here = side.device(value)
        if device is None:
            first, device = path, here
        elif here is not None and here != device:
            raise ValueError(
                f"{function}: `{path}` must be on the device of `{first}`, {device}, got {here}; bring both to one device"
            )


def _came(path: str, value: Any, argument: Argument, side: Side) -> Came:
    ours = isinstance(value, side.arrays)
    if ours or (hasattr(value, "shape") and hasattr(value, "dtype")):
        dtype, package = str(value.dtype), type(value).__module__.partition(".")[0]
        shape = tuple(side.sizes(value))
        if not ours:
            return Came(path, argument.text, f"{package} {dtype}", shape, "", side.foreign.get(package, ""))
        mask = argument.forms[0].kind == "Bool" and "int" in dtype
        smallest = side.smallest(value) if mask else None
        labels = smallest is not None and smallest < 0
        return Came(path, argument.text, dtype, shape, dtype, f"give labels != {smallest}" if labels else "")
    if value is None or isinstance(value, (int, float, str)):  # noqa: UP038
        return Came(path, argument.text, repr(value), None, "", "")
    return Came(path, argument.text, type(value).__name__, None, "", _inside(path, value, argument, side))


def _inside(path: str, value: Any, argument: Argument, side: Side) -> str:
    """Where the argument lies in what came."""
    form = argument.forms[0]
    if form.kind in _ARRAYS:
        for name in ("logits", "last_hidden_state"):
            if hasattr(value, name):
                return f"give {path}.{name}"
            if isinstance(value, Mapping) and name in value:
                return f"give {path}[{name!r}]"
        if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], side.arrays):  # noqa: UP038
            return "stack the views into one array" if "views" in form.axes[0] else f"give one array, such as {path}[0]"
    elif len(argument.inner) and form.kind != "Sequence":
        if isinstance(value, Mapping):
            return f"give {argument.text}(**{path})"
        if isinstance(value, (list, tuple)):  # noqa: UP038
            return f"give {argument.text}(*{path})"
    return ""


def describe(value: Any, arrays: tuple[type, ...]) -> str:
    """An array by its dtype and shape, a number or text as it is, all else by its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        package = "" if isinstance(value, arrays) else type(value).__module__.partition(".")[0] + " "
        return _array(package + str(value.dtype), value.shape)
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


def _array(dtype: str, shape: Any) -> str:
    return f"{dtype.replace('torch.', '')}[{', '.join(map(str, shape))}]"


_ALIASES = {
    **dict.fromkeys(("t", "tau", "temp", "kd_t", "softmax_temp"), "temperature"),
    **dict.fromkeys(("mask", "masks", "weight", "weights", "sample_weight", "ignore_index"), "where"),
    **dict.fromkeys(("size_average", "reduce"), "reduction"),
    **dict.fromkeys(("target", "targets", "label", "gt", "y"), "labels"),
    **dict.fromkeys(("group", "process_group"), "axis_name"),
    "axis_name": "group",
}
_DEVICES = "axis_name (kdjax) or group (kdtorch)"


def misfit(
    function: str,
    positional: tuple[str, ...],
    names: tuple[str, ...],
    required: tuple[str, ...],
    number: int,
    keywords: tuple[str, ...],
) -> str:
    """Of so many arguments by place, and these by name, that are not the function's."""
    options = [_DEVICES if name in _DEVICES else name for name in names if name not in positional]
    taken = f"the arguments are {', '.join(positional)}; the options, given by name, {', '.join(options)}"
    if number > len(positional):
        return f"{function}: takes {len(positional)} positional arguments, got {number}; {taken}"
    for keyword in keywords:
        if keyword in positional[:number]:
            return f"{function}: got multiple values for argument {keyword!r}; {taken}"
        if keyword not in names:
            wanted = _ALIASES.get(keyword.lower(), keyword.lower())
            words = set(wanted.split("_"))
            near = [name for name in names if wanted in name or words == set(name.split("_"))]
            near = near or difflib.get_close_matches(wanted, names, 1)
            mend = "write " + " or ".join(f"`{name}`" for name in near) if near else taken
            return f"{function}: got an unexpected keyword argument {keyword!r}; {mend}"
    absent = next(name for name in required if name not in (*positional[:number], *keywords))
    return f"{function}: missing a required argument: {absent!r}; {taken}"


def explain(function: str, path: str, everything: tuple[Came, ...]) -> str:
    """Of the arguments, the one at `path` does not fit."""
    at = [came[0] for came in everything].index(path)
    came = everything[at]
    got = came.got if came.shape is None else _array(came.got, came.shape)
    if came.expected == "Scalar":
        mend = f"; give {path}[0]" if came.dtype and came.shape == (1,) else ""
        return f"{function}: `{path}` must be a number or a floating-point or integer array of shape [], got {got}{mend}"
    beside = [f"{x.path} {_array(x.got, x.shape)}" for x in everything[:at] if x.shape is not None]
    mend = came.mend or (_mend(came, [x for x in everything if x.dtype]) if came.dtype else "")
    return (
        f"{function}: `{path}` must be {came.expected}, got {got}"
        + (f" beside {', '.join(beside)}" if beside else "")
        + (f"; {mend}" if mend else "")
    )


def _mend(came: Came, arrays: list[Came]) -> str:
    """What to write instead of an array, where the mistake is a known one."""
    name, text, shape, first = came.path, came.expected, came.shape or (), arrays[0]
    if text.startswith("Sequence"):
        return f"give [{name}]"
    axes, like = text.split("'")[1].split(), first.shape or ()
    floats = [x.path for x in arrays if x.expected.startswith("Float") and x.shape == like]
    if text.startswith("Float"):
        return _mend_float(came, axes, arrays, floats)
    if shape == (*like[:-1], 1):
        return f"give {name}[..., 0]"
    if len(like) > 2 and shape == (like[0], *like[2:]):
        return (
            f"the last axis must be {first.expected.split()[-1][:-2]}; give x.movedim(1, -1) in PyTorch, "
            f"jnp.moveaxis(x, 1, -1) in JAX, for {' and '.join(floats)}"
        )
    if len(like) > 2 and shape[:-1] == like[:-2] and len(shape) == len(like) - 1:
        cut = f"[{':, ' * (len(like) - 2)}:-1]"
        if shape[-1] == like[-2] - 1:
            return f"{name} is one shorter; if it is shifted by a token, shift too: {', '.join(x + cut for x in floats)}"
        if shape[-1] == like[-2] + 1:
            return f"{name} is one longer; if the others are shifted by a token, give {name}{cut.replace(':-1', '1:')}"
    if text.startswith("Bool"):
        if "bool" in came.dtype:
            return ""
        labels = ", or labels != -100 if these are labels" if "int" in came.dtype else ""
        return f"give {name} != 0{labels}"
    if "float" not in came.dtype:
        return ""
    return f"give {name}.argmax(-1)" if shape == like else f"cast {name} to integers"


def _mend_float(came: Came, axes: list[str], arrays: list[Came], floats: list[str]) -> str:
    name, shape, first, like = came.path, came.shape or (), arrays[0].path, arrays[0].shape or ()
    if "float" not in came.dtype:
        return f"the order of the arrays is {', '.join(x.path for x in arrays)}" if "int" in came.dtype else ""
    if len(shape) == len(axes) + 1 and shape[0] == 1 and name.startswith("state."):
        return f"give {name}[0]"
    if len(axes) == 3 and len(shape) == 2 and axes[0].endswith("views"):
        return f"stack the views on a first axis: {name}.reshape(views, -1, {shape[-1]})"
    if axes[0] == "batch" and len(axes) == 2 < len(shape):
        return f"give {name}.reshape(-1, {shape[-1]})"
    if name.startswith("state."):
        return f"make a state of width {like[-1]}"
    if name == first or not shape:
        return ""
    if axes[-1] == "classes" and shape[:-1] == like[:-1]:
        wider, other = (name, first) if shape[-1] > like[-1] else (first, name)
        few, many = sorted((shape[-1], like[-1]))
        mend = f"{wider} has {many - few} classes more; if they are padding, cut them off: {wider}[..., :{few}]"
        return mend if wider == name else f"{mend}; if the student uses them, give {other} -inf there"
    if len(shape) > 2 and sorted(shape) == sorted(like):
        return f"bring the {axes[-1]} of both to the last axis"
    if len(shape) > 2 and (*shape[:-2], shape[-1]) == (*like[:-2], like[-1]) and abs(shape[-2] - like[-2]) == 1:
        longer = name if shape[-2] > like[-2] else first
        return f"{longer} is one longer; if the other is shifted by a token, give {longer}[{':, ' * (len(like) - 2)}:-1]"
    if "batch" in axes[0] and shape[1:] == like[1:]:
        return "give both the same examples"
    return ""
