"""Checks the arguments of public functions against their annotations, and makes errors that say what to write instead.

It imports neither framework. `torch.compile` traces `check` and the functions below it down to `Given`, so they use
plain Python only. `misfit` and `explain` write the texts; they take only constants, and are not traced.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import inspect
import numbers
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

_DTYPES = {"Float": "float", "Integer": "int", "Bool": "bool"}


class Form(NamedTuple):
    """One of the forms that an argument may have.

    Attributes:
        kind: `"Array"`; `"Scalar"`, a number or an array of shape []; `"Sequence"`; `"bool"`; `"int"`; `"float"`, any number
            but no array; `"None"`; the name of another type; or `"any"`, which the function itself checks: a choice among
            texts.
        dtype: a part of the names of an array's dtypes: `"float"`, `"int"` or `"bool"`.
        axes: the names of an array's axes: `*name` stands for any number of axes, `_` for one of any size.
    """

    kind: str
    dtype: str = ""
    axes: tuple[str, ...] = ()


class Argument(NamedTuple):
    """A parameter, an item of a sequence, or a field of a state.

    Attributes:
        name: the name of the parameter or field.
        text: its annotation, as an error shows it.
        forms: the forms that it may have.
        inner: the item of a sequence, or the fields of a state.
    """

    name: str
    text: str
    forms: tuple[Form, ...]
    inner: tuple[Argument, ...] = ()


class Plan(NamedTuple):
    """The parameters of a function. It holds texts and tuples only, so that `torch.compile` can take it for a constant."""

    function: str
    arguments: tuple[Argument, ...]
    positional: tuple[str, ...]
    names: tuple[str, ...]
    required: tuple[str, ...]


class Given(NamedTuple):
    """The value that was given for an argument.

    Attributes:
        path: the argument, or the item or field of it: `state.center`.
        expected: its annotation.
        got: its description, without its shape.
        shape: the shape of an array of any library.
        dtype: the dtype of an array of this framework; "" for everything else.
        mend: what to write instead, if this value alone shows it.
    """

    path: str
    expected: str
    got: str
    shape: tuple[int, ...] | None
    dtype: str
    mend: str


class Framework(NamedTuple):
    """What the check needs to know about a framework.

    Attributes:
        arrays: the types of its arrays.
        foreign: how to convert the arrays of another library, by the name of its module.
        sizes: the shape of an array as numbers.
        smallest: the smallest entry of an array, or None while a compiler traces.
        device: the name of the device that an array must stay on, or None.
    """

    arrays: tuple[Any, ...]
    foreign: Mapping[str, str]
    sizes: Callable[[Any], Sequence[int]]
    smallest: Callable[[Any], int | None]
    device: Callable[[Any], str | None]


def read(function: Callable[..., Any]) -> tuple[Plan, dict[str, Any]]:
    """The parameters of a function, from its annotations, and the types that these name."""
    parameters, scope = inspect.signature(function).parameters, function.__globals__
    types: dict[str, Any] = {}
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
        case ast.Subscript(ast.Name(kind), ast.Tuple([_, ast.Constant(str(axes))])) if kind in _DTYPES:
            return [Form("Array", _DTYPES[kind], tuple(axes.split()))]
        case ast.Subscript(ast.Name("Sequence"), item):
            inner.append(_argument("", ast.unparse(item), scope, types))
            return [Form("Sequence")]
        case ast.Constant(None):
            return [Form("None")]
        case ast.Name("Scalar" | "bool" | "int" | "float"):
            return [Form(node.id)]
        case ast.Name(name):
            hint = scope.get(name, getattr(builtins, name, None))
            if get_origin(hint) is Literal:
                return [Form("any")]
        case _:
            return [Form("any")]
    types[name] = tuple(get_origin(x) or x for x in get_args(hint) or (hint,))
    if issubclass(types[name][0], tuple):  # a state
        module = vars(sys.modules[hint.__module__])
        inner += [_argument(field, text, module, types) for field, text in hint.__annotations__.items()]
    return [Form(name)]


def check(
    plan: Plan, types: dict[str, Any], framework: Framework, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Any, Argument]]:
    """Raise an error if an argument does not fit; return all arguments, with the items of sequences and the fields of states."""
    given = _bound(plan, args, kwargs)
    if given is None:
        raise TypeError(misfit(plan.function, plan.positional, plan.names, plan.required, len(args), tuple(kwargs)))
    leaves = _leaves(plan, types, given)
    sizes: dict[str, Any] = {}
    for path, value, argument in leaves:
        if not _fits(value, argument.forms, types, framework.arrays, sizes):
            everything = tuple([_given(x, y, a, framework) for x, y, a in leaves])
            raise TypeError(explain(plan.function, path, everything))
    _check_devices(plan.function, leaves, framework)
    return leaves


def _bound(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name, or None if they do not fit the function's parameters."""
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
            if isinstance(value, (list, tuple)):  # every version of PyTorch can trace this form
                for i, item in enumerate(value):
                    leaves.append((f"{argument.name}[{i}]", item, argument.inner[0]))
        elif isinstance(value, types[kind]):
            for field in argument.inner:
                leaves.append((f"{argument.name}.{field.name}", getattr(value, field.name), field))
    return leaves


def _fits(
    value: Any, forms: tuple[Form, ...], types: dict[str, Any], arrays: tuple[Any, ...], sizes: dict[str, Any]
) -> bool:
    for form in forms:
        kind = form.kind
        if kind == "Array":
            fits = isinstance(value, arrays) and form.dtype in str(value.dtype)
            fits = fits and _axes_fit(value.shape, form.axes, sizes)
        elif kind == "None":
            fits = value is None
        elif kind == "Scalar":
            if isinstance(value, arrays):
                fits = len(value.shape) == 0 and ("float" in str(value.dtype) or "int" in str(value.dtype))
            else:
                fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        elif kind == "Sequence":
            fits = isinstance(value, (list, tuple))
        elif kind == "bool":
            fits = isinstance(value, bool)
        elif kind == "int":
            fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        elif kind == "float":
            fits = isinstance(value, numbers.Real) and not isinstance(value, (bool, *arrays))
        else:
            fits = kind == "any"
            for one in () if fits else types[kind]:  # torch.compile asks a process group for one type only
                fits = fits or isinstance(value, one)
        if fits:
            return True
    return False


def _axes_fit(shape: tuple[Any, ...], axes: tuple[str, ...], sizes: dict[str, Any]) -> bool:
    """Whether a shape has these axes, each as long as `sizes` says; the lengths of new axes are added to `sizes`."""
    free = len(shape) - len(axes)
    parts = [*shape]
    if len(axes) and axes[0][0] == "*":
        free += 1
        parts = [tuple(shape[:free]), *shape[free:]] if free >= 0 else parts
    elif free > 0:
        return False
    if free < 0:
        return False
    new = {**sizes}
    for name, size in zip(axes, parts, strict=True):
        if name != "_":
            if name in new and new[name] != size:
                return False
            new[name] = size
    sizes.update(new)
    return True


def _check_devices(function: str, leaves: list[tuple[str, Any, Argument]], framework: Framework) -> None:
    first, device = "", None
    for path, value, argument in leaves:
        if argument.forms[0].kind == "Scalar" or "." in path or not isinstance(value, framework.arrays):
            continue  # numbers and states are moved to the device of the other arguments
        here = framework.device(value)
        if device is None:
            first, device = path, here
        elif here is not None and here != device:
            raise ValueError(
                f"{function}: `{path}` must be on the device of `{first}`, {device}, got {here}; move both to one device"
            )


def _given(path: str, value: Any, argument: Argument, framework: Framework) -> Given:
    ours = isinstance(value, framework.arrays)
    if type(value) is int:  # `torch.compile` can neither read attributes of a symbolic size nor print it
        return Given(path, argument.text, str(operator.index(value)), None, "", "")
    if ours or (hasattr(value, "shape") and hasattr(value, "dtype")):
        dtype, shape = str(value.dtype), tuple(framework.sizes(value))
        if not ours:
            package = type(value).__module__.partition(".")[0]
            return Given(path, argument.text, f"{package} {dtype}", shape, "", framework.foreign.get(package, ""))
        mask = argument.forms[0].dtype == "bool" and "int" in dtype
        smallest = framework.smallest(value) if mask else None
        labels = smallest is not None and smallest < 0
        return Given(path, argument.text, dtype, shape, dtype, f"give labels != {smallest}" if labels else "")
    if value is None or isinstance(value, (int, float, str)):
        return Given(path, argument.text, repr(value), None, "", "")
    return Given(path, argument.text, type(value).__name__, None, "", _inside(path, value, argument, framework))


def _inside(path: str, value: Any, argument: Argument, framework: Framework) -> str:
    """How to get the argument from the object that was given."""
    form = argument.forms[0]
    if form.kind == "Array":
        if path.endswith("_weight"):
            for name, of_head in (("weight", f"{path}.weight"), ("kernel", f"{path}.kernel[...].T")):
                if hasattr(value, name):
                    return f"give {of_head}"
        if path.endswith("_hidden") and getattr(value, "hidden_states", None) is not None:
            return f"give {path}.hidden_states[-1]"
        for name in ("last_hidden_state",) if path.endswith("_hidden") else ("logits", "last_hidden_state"):
            if hasattr(value, name):
                return f"give {path}.{name}"
            if isinstance(value, Mapping) and name in value:
                return f"give {path}[{name!r}]"
        if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], framework.arrays):
            return "stack the views into one array" if "views" in form.axes[0] else f"give one array, such as {path}[0]"
    elif len(argument.inner) and form.kind != "Sequence":
        if isinstance(value, Mapping):
            return f"give {argument.text}(**{path})"
        if isinstance(value, (list, tuple)):
            return f"give {argument.text}(*{path})"
    return ""


def describe(value: Any, arrays: tuple[Any, ...]) -> str:
    """Describe an array by its dtype and shape, a number or text by its value, and everything else by its type."""
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
    **dict.fromkeys(("final_logit_softcapping", "logit_softcapping", "soft_cap"), "softcap"),
    "logit_scale": "scale",
    "axis_name": "group",
    "class_group": "class_axis_name",
    "class_axis_name": "class_group",
}
_DEVICES = dict.fromkeys(("axis_name", "group"), "axis_name (kdjax) or group (kdtorch)")
_DEVICES |= dict.fromkeys(("class_axis_name", "class_group"), "class_axis_name (kdjax) or class_group (kdtorch)")


_WHOLE = (
    "it needs all classes of an example in one place: gather them, or use kl_loss, reverse_kl_loss, symmetric_kl_loss, "
    "jsd_loss, topk_kl_loss or one of linear heads, whose classes may be spread over devices"
)


def misfit(
    function: str,
    positional: tuple[str, ...],
    names: tuple[str, ...],
    required: tuple[str, ...],
    number: int,
    keywords: tuple[str, ...],
) -> str:
    """The error for a call with this number of positional arguments and these keywords."""
    options = [_DEVICES.get(name, name) for name in names if name not in positional]
    taken = f"the arguments are {', '.join(positional)}; the options, given by name, {', '.join(options)}"
    if number > len(positional):
        return f"{function}: takes {len(positional)} positional arguments, got {number}; {taken}"
    for keyword in keywords:
        if keyword in positional[:number]:
            return f"{function}: got multiple values for argument {keyword!r}; {taken}"
        if keyword not in names:
            wanted = _ALIASES.get(keyword.lower(), keyword.lower())
            words = set(wanted.split("_"))
            near = [name for name in names if (len(wanted) > 3 and wanted in name) or words == set(name.split("_"))]
            near = [wanted] if wanted in near else near
            if not near and wanted in ("class_axis_name", "class_group"):
                return f"{function}: got an unexpected keyword argument {keyword!r}; {_WHOLE}"
            near = near or difflib.get_close_matches(wanted, names, 1)
            mend = "write " + " or ".join(f"`{name}`" for name in near) if near else taken
            return f"{function}: got an unexpected keyword argument {keyword!r}; {mend}"
    absent = next(name for name in required if name not in (*positional[:number], *keywords))
    return f"{function}: missing a required argument: {absent!r}; {taken}"


def explain(function: str, path: str, everything: tuple[Given, ...]) -> str:
    """The error about the argument at `path`, which does not fit."""
    at = [x.path for x in everything].index(path)
    given = everything[at]
    got = given.got if given.shape is None else _array(given.got, given.shape)
    if given.expected in ("Scalar", "Scalar | None"):
        none = ", or None" if given.expected != "Scalar" else ""
        mend = f"; give {path}[0]" if given.dtype and given.shape == (1,) else ""
        return f"{function}: `{path}` must be a number or a floating-point or integer array of shape []{none}, got {got}{mend}"
    if given.expected == "float":
        mend = (
            f"; it determines how the loss is computed: give float({path}), outside the traced function"
            if given.dtype
            else ""
        )
        return f"{function}: `{path}` must be a number, got {got}{mend}"
    beside = [f"{x.path} {_array(x.got, x.shape)}" for x in everything[:at] if x.shape is not None]
    mend, sizes = given.mend, [n for x in everything for n in x.shape or ()]
    if not mend and given.dtype and all(isinstance(n, int) for n in sizes):  # jax.export has symbols
        mend = _mend(given, [x for x in everything if x.dtype])
    return (
        f"{function}: `{path}` must be {given.expected}, got {got}"
        + (f" beside {', '.join(beside)}" if beside else "")
        + (f"; {mend}" if mend else "")
    )


def _mend(given: Given, arrays: list[Given]) -> str:
    """What to write instead of an array, if the mistake is a known one."""
    name, text, shape, first = given.path, given.expected, given.shape or (), arrays[0]
    if text.startswith("Sequence"):
        return f"give [{name}]"
    axes, like = text.split("'")[1].split(), first.shape or ()
    floats = [x.path for x in arrays if x.expected.startswith("Float") and x.shape == like]
    if text.startswith("Float"):
        return _mend_float(given, axes, arrays, floats)
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
            others = [x for x in arrays if x.expected.startswith("Float") or len(x.shape or ()) == len(like)]
            long = [x.path + cut for x in others if (x.shape or ())[: len(shape)] == like[:-1]]
            return f"{name} is one shorter; if it is shifted by a token, shift too: {', '.join(long)}"
        if shape[-1] == like[-2] + 1:
            return f"{name} is one longer; if the others are shifted by a token, give {name}{cut.replace(':-1', '1:')}"
    if text.startswith("Bool"):
        if "bool" in given.dtype:
            return ""
        labels = ", or labels != -100 if these are labels" if "int" in given.dtype else ""
        return f"give {name} != 0{labels}"
    if "float" not in given.dtype:
        return ""
    return f"give {name}.argmax(-1)" if shape == like else f"cast {name} to integers"


def _mend_float(given: Given, axes: list[str], arrays: list[Given], floats: list[str]) -> str:
    name, shape, first, like = given.path, given.shape or (), arrays[0].path, arrays[0].shape or ()
    if name.endswith(("_hidden", "_weight", "_bias")):
        return _mend_head(given, {x.path: x for x in arrays})
    if name == "weights" and "float" not in given.dtype:
        return (
            "give where=weights"
            if "bool" in given.dtype
            else "give weights in the dtype of the loss, or where=weights != 0"
        )
    if "float" not in given.dtype:
        return f"the order of the arrays is {', '.join(x.path for x in arrays)}" if "int" in given.dtype else ""
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
        mend = f"{wider} has {many - few} more classes; if they are padding, cut them off: {wider}[..., :{few}]"
        return mend if wider == name else f"{mend}; if the student uses them, give {other} -inf there"
    if len(shape) > 2 and sorted(shape) == sorted(like):
        return f"move the {axes[-1]} of both to the last axis"
    if len(shape) > 2 and (*shape[:-2], shape[-1]) == (*like[:-2], like[-1]) and abs(shape[-2] - like[-2]) == 1:
        longer = name if shape[-2] > like[-2] else first
        return (
            f"{longer} is one longer; if the other is shifted by a token, give {longer}[{':, ' * (len(like) - 2)}:-1]"
        )
    if (
        axes == ["*batch"]
        and len(shape) == len(like) > 1
        and abs(shape[-1] - like[-1]) == 1
        and shape[:-1] == like[:-1]
    ):
        longer = name if shape[-1] > like[-1] else first
        return (
            f"{longer} is one longer; if the other is shifted by a token, give {longer}[{':, ' * (len(like) - 1)}:-1]"
        )
    if "batch" in axes[0] and shape[1:] == like[1:]:
        return "give both the same examples"
    return ""


def _mend_head(given: Given, arrays: Mapping[str, Given]) -> str:
    """What to write instead of hidden states, the weight of a head, or its bias."""
    side, _, kind = given.path.partition("_")
    shape = given.shape or ()
    hidden, weight = (
        arrays[f"{side}_{x}"].shape or () if f"{side}_{x}" in arrays else () for x in ("hidden", "weight")
    )
    if kind == "hidden":
        if "int" in given.dtype:
            return (
                f"if these are labels or token ids, give the hidden states before {side}_weight, as output_hidden_states=True "
                "returns them"
            )
        first = next(x for x in arrays.values() if x.path.endswith("_hidden"))
        like = first.shape or ()
        if len(shape) == len(like) > 2 and shape[:-2] == like[:-2] and abs(shape[-2] - like[-2]) == 1:
            longer = given.path if shape[-2] > like[-2] else first.path
            return f"{longer} is one longer; if the other is shifted by a token, give {longer}[{':, ' * (len(like) - 2)}:-1]"
        return ""
    if "float" not in given.dtype:
        return f"cast {given.path} to floating point"
    ours = arrays["student_weight"].shape or () if "student_weight" in arrays else ()
    if kind == "bias":
        if shape in ((1, *weight[:1]), (*weight[:1], 1)):
            return f"give {given.path}.reshape(-1)"
        return f"it must have a number for each of the {weight[0]} rows of {side}_weight" if weight else ""
    if len(shape) != 2 or not hidden:
        return ""
    if shape[0] == hidden[-1] != shape[1] and (side == "student" or shape[1] == ours[0]):
        logits = f"; if {side}_hidden are logits, the hidden states before them" if shape[0] > shape[1] else ""
        return f"give {given.path}.T{logits}"
    if shape[1] != hidden[-1]:
        return (
            f"its rows must be as wide as {side}_hidden, {hidden[-1]}, got {shape[1]}; give the weight of the head that takes "
            "these hidden states"
        )
    few, many = sorted((shape[0], ours[0]))
    wider, other = ("teacher", "student") if shape[0] == many else ("student", "teacher")
    return (
        f"the vocabularies have {ours[0]} and {shape[0]} classes; if the {many - few} more of {wider}_weight are padding, cut them "
        f"off: {wider}_weight[:{few}]; if not, fill {other}_weight up by rows of 0 and give {other}_bias -inf there"
    )
