"""Reads the configuration of `make_loss`: the losses that it names, their weights and their settings."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from kdlosses.settings import is_whole

Source = str | Callable[[Mapping[str, Any]], Any]
Weight = float | Callable[[Any], Any]

# what a parameter of a loss reads; any other parameter reads the entry of `feat` with its name
READS = {
    "student": "stu",
    "teacher": "tea",
    "student_logits": "score_stu",
    "teacher_logits": "score_tea",
    "student_maps": "feats_stu",
    "teacher_maps": "feats_tea",
    "labels": "target",
}
# keyword-only parameters that are given at each call or by the framework, and are not settings
NO_SETTINGS = (
    *("teacher_targets", "where", "reduction", "axis_name", "group", "class_axis_name", "class_group", "update"),
    *("rngs", "generator"),
)


class Term(NamedTuple):
    """One name of a configuration.

    Attributes:
        loss: a function, or the class of a module.
        reads: where its inputs come from: `"target"`, `"epoch"`, an entry of `feat`, or a function of a mapping of all
            these; an entry whose name ends in `?` may be absent, and is then None.
        options: settings that differ from the loss's own defaults.
        arguments: what a module is built with: paths into the configuration, `"num_classes"`, `"num_data"`.
    """

    loss: Callable[..., Any]
    reads: tuple[Source, ...]
    options: Mapping[str, Any] = {}
    arguments: tuple[str, ...] = ()


class Wanted(NamedTuple):
    """A loss that a configuration names, with the arguments to build it.

    Attributes:
        name: its name in the configuration.
        loss: a function, or the class of a module.
        reads: as in `Term`.
        arguments: the positional arguments of a module.
        options: the options of the term and of the configuration, by name.
    """

    name: str
    loss: Callable[..., Any]
    reads: tuple[Source, ...]
    arguments: list[int]
    options: dict[str, Any]


def by_function(package: ModuleType, table: Mapping[str, Term], reads: Mapping[str, Source]) -> dict[str, Term]:
    """A term for each loss of a package by the name of its function, and by that name without `_loss`.

    Args:
        package: kdjax or kdtorch.
        table: the terms of modules that hold a function, by the function's name.
        reads: what each parameter reads.
    """
    terms: dict[str, Term] = {}
    for name in package.__all__:
        if not name.endswith("_loss") or name == "make_loss":
            continue
        function, short = getattr(package, name), name.removesuffix("_loss")
        inputs = [p for p in parameters(function).values() if p.kind is not p.KEYWORD_ONLY]
        sources = (reads.get(p.name, p.name if p.default is p.empty else f"{p.name}?") for p in inputs)
        held = short in table and inspect.isclass(table[short].loss)
        terms[name] = terms[short] = table[short] if held else Term(function, tuple(sources))
    return terms


def read(
    config: Any, founding: Mapping[str, Term], functions: Mapping[str, Term], numbers: Mapping[str, Any]
) -> tuple[list[Wanted], list[Weight]]:
    """The losses that a configuration names, and their weights.

    Args:
        config: a mapping or an object.
        founding: the terms by the names of the founding code, which take precedence.
        functions: the terms by the names of functions.
        numbers: the numbers of classes and samples, by name.

    Raises:
        ValueError: a mistake in the configuration.
    """
    names = _names(_get(config, "MODEL.METRIC_LOSS_TYPE"), founding, functions)
    weights = check_weights("MODEL.KD_LOSS_WEIGHT", _get(config, "MODEL.KD_LOSS_WEIGHT"), names)
    settings = _mapping("", _get(config, "MODEL.KD_LOSS_ARGS", default={}), {"dkd": {"beta": 8.0}})
    if stray := sorted(set(settings) - set(names), key=str):
        raise ValueError(f"MODEL.KD_LOSS_ARGS must name losses of MODEL.METRIC_LOSS_TYPE, {names}, got {stray}")

    wanted = []
    for name in names:
        term = {**functions, **founding}[name]
        if "state" in term.reads:
            raise ValueError(
                f"the loss {name!r} takes a state and returns the next one, but no module holds it; call "
                f"`{term.loss.__name__}` next to the combined loss, and keep its state yourself"
            )
        arguments = [
            _size(f"`{path}`", numbers[path]) if path in numbers else _size(path, _get(config, path, name))
            for path in term.arguments
        ]
        options = {**term.options, **_options(name, term.loss, settings.get(name, {}))}
        wanted.append(Wanted(name, term.loss, term.reads, arguments, options))
    return wanted, weights


def parameters(loss: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(loss.__init__ if inspect.isclass(loss) else loss).parameters


def refused(name: str, error: Exception) -> ValueError:
    """The error of a loss about its settings, with the path of the settings in the configuration."""
    return ValueError(f"MODEL.KD_LOSS_ARGS[{name!r}]: {error}")


def example(function: Callable[..., Any], array: Callable[[tuple[int, ...], str], Any]) -> list[Any] | None:
    """Small inputs of a loss, to check its settings with; None if it takes inputs that are not arrays.

    Optional inputs are included, because a setting may need them.

    Args:
        function: the loss, whose annotations say the shapes.
        array: makes an array from a shape and `"float"`, `"int"` or `"bool"`.
    """
    hints = get_type_hints(inspect.unwrap(function))
    inputs = [p for p in parameters(function).values() if p.kind is not p.KEYWORD_ONLY]
    arrays = [_example(hints[p.name], array) for p in inputs]
    return None if any(x is None for x in arrays) else arrays


def _example(hint: Any, array: Callable[[tuple[int, ...], str], Any]) -> Any:
    if get_origin(hint) is Sequence:
        return [_example(get_args(hint)[0], array)] * 2  # some losses need at least two
    while get_args(hint):  # the first of several kinds of array
        hint = get_args(hint)[0]
    if not hasattr(hint, "dim_str"):
        return None
    kind = next(kind for kind in ("float", "int", "bool") if any(kind in dtype for dtype in hint.dtypes))
    return array(tuple(int(d) if d.isdecimal() else 4 for d in hint.dim_str.split()), kind)


def check_weights(place: str, given: Any, names: Sequence[str]) -> list[Weight]:
    """One weight for each loss: a number, or a function of the epoch.

    Raises:
        ValueError: a different number of weights, or something that is not a weight.
    """
    weights = list(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else []
    if not weights or not all(callable(weight) or _is_weight(weight) for weight in weights):
        raise ValueError(
            f"{place} must be finite numbers, none below 0, or functions of the epoch, one per loss, as in [1.0, 0.5], "
            f"got {given!r}"
        )
    if len(weights) != len(names):
        raise ValueError(
            f"{place} must have one number per loss: {len(names)} for {names}, got {len(weights)}: {weights}"
        )
    return [weight if callable(weight) else float(weight) for weight in weights]


def weight_at(name: str, weight: Weight, epoch: Any) -> Any:
    """The value of a weight, at the epoch if it is a function of the epoch.

    Raises:
        ValueError: no epoch, a negative number.
    """
    if not callable(weight):
        return weight
    if epoch is None:
        raise ValueError(f"the weight of {name!r} is a function of the epoch, which is missing; give `epoch`")
    value = weight(epoch)
    if not hasattr(value, "shape") and not _is_weight(value):
        raise ValueError(f"the weight of {name!r} must be finite and at least 0, got {value!r} at epoch {epoch}")
    return value


def _is_weight(x: Any) -> bool:
    if isinstance(x, bool | str) or getattr(x, "requires_grad", False):  # its gradient would be lost
        return False
    try:
        return 0 <= float(x) < math.inf
    except (TypeError, ValueError):
        return False


def _names(text: Any, founding: Mapping[str, Term], functions: Mapping[str, Term]) -> list[str]:
    prefix, *names = str(text).split("-")
    if prefix != "kd":
        raise ValueError(f"MODEL.METRIC_LOSS_TYPE must begin with 'kd-', as in 'kd-dino-bce-dkd', got {text!r}")
    known = f"{sorted(founding)} or any loss by the name of its function, such as 'kl_loss' or 'kl'"
    if not any(names):
        raise ValueError(f"MODEL.METRIC_LOSS_TYPE must name at least one loss after 'kd-', of {known}, got {text!r}")
    if "" in names:
        mended = "-".join(filter(None, (prefix, *names)))
        raise ValueError(f"MODEL.METRIC_LOSS_TYPE has an empty name in {text!r}; write {mended!r}")
    for name in names:
        if name not in founding and name not in functions:
            near = name.removesuffix("_loss")
            if near not in founding:
                near = difflib.get_close_matches(name.lower(), [*founding, *functions], 1, 0)[0]
            raise ValueError(
                f"MODEL.METRIC_LOSS_TYPE names an unknown loss {name!r}; did you mean {near!r}"
                f"{_alias(near, founding)}? known are {known}"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"MODEL.METRIC_LOSS_TYPE names {name!r} more than once: {text!r}; give it one weight instead"
            )
    return names


def _alias(name: str, founding: Mapping[str, Term]) -> str:
    """A note with the function that a founding name stands for, if the name does not show it."""
    function = founding[name].loss if name in founding else None
    if not inspect.isfunction(function) or function.__name__.startswith((name, "_")):
        return ""
    return f", which is `{function.__name__}`"


def _get(config: Any, path: str, needed_by: str | None = None, **default: Any) -> Any:
    node = config
    for i, key in enumerate(path.split(".")):
        if key in _keys(node) or (not _has_keys(node) and hasattr(node, key)):
            node = node[key] if _has_keys(node) else getattr(node, key)
        elif default:
            return default["default"]
        else:
            above = ".".join(path.split(".")[:i]) or "the configuration"
            reason = f", which the loss {needed_by!r} needs" if needed_by else ""
            raise ValueError(f"the configuration has no {path}{reason}; {above} has {_keys(node)}")
    return node


def _has_keys(node: Any) -> bool:
    """Whether a node is a mapping, or is read like one, such as a ConfigDict."""
    return isinstance(node, Mapping) or (hasattr(node, "keys") and hasattr(node, "__getitem__"))


def _keys(node: Any) -> list[Any]:
    """The keys of a mapping, or the public attributes of an object or of its class."""
    if _has_keys(node):
        return list(node.keys())
    names = getattr(node, "_fields", None) or getattr(node, "__dict__", None) or dir(node)
    return [key for key in names if not key.startswith("_") and not inspect.isroutine(getattr(node, key))]


def _mapping(place: str, given: Any, example: dict[str, Any]) -> dict[str, Any]:
    if _has_keys(given):
        return {key: given[key] for key in _keys(given)}
    if hasattr(given, "_fields") or hasattr(given, "__dict__") or dataclasses.is_dataclass(given):
        return {key: getattr(given, key) for key in _keys(given)}
    raise ValueError(f"MODEL.KD_LOSS_ARGS{place} must be a mapping, as in {example}, got {given!r}")


def _size(path: str, given: Any) -> int:
    if not is_whole(given, 1):
        raise ValueError(f"{path} must be a whole number of at least 1, got {given!r}")
    return int(given)


def _options(name: str, loss: Callable[..., Any], given: Any) -> dict[str, Any]:
    given = _mapping(f"[{name!r}]", given, {"temperature": 4.0})
    known = {p.name: p for p in parameters(loss).values() if p.kind is p.KEYWORD_ONLY and p.name not in NO_SETTINGS}
    if stray := sorted(set(given) - set(known), key=str):
        raise ValueError(f"MODEL.KD_LOSS_ARGS[{name!r}] must have settings of {list(known)}, got {stray}")
    if missing := [key for key, p in known.items() if p.default is p.empty and key not in given]:
        raise ValueError(f"MODEL.KD_LOSS_ARGS[{name!r}] must give {missing}, which has no default, got {given}")
    return given
