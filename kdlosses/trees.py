"""Trees of arrays, and their packed form between the two frameworks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

# A packed tree consists of these, and of NumPy arrays, numbers, strings and None:
#   {"dict": {key: node}}  {"list": [node]}  {"tuple": [node]}
#   {"state": reference, "fields": {field: node}}
#   {"function": reference}
#   {"module": reference or None, "arguments": node, "training": bool, "layers": [...], "weights": {name: array},
#    "keys": names of weights that are keys of JAX, and their kinds}
# A reference is the path of something that both packages have, such as "selfsupervised.dino:DINOState". The weights of
# a module have PyTorch's names and axes; `kdlosses.layers` describes the layers.
Packed = Any


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree of dicts, lists, tuples and named tuples, by path."""
    if isinstance(tree, Mapping):
        children = [(f"{path}.{key}" if path else str(key), tree[key]) for key in tree]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = [(f"{path}.{key}" if path else key, getattr(tree, key)) for key in tree._fields]
    elif isinstance(tree, list | tuple):
        children = [(f"{path}[{i}]", child) for i, child in enumerate(tree)]
    else:
        return {path: tree}
    return {place: leaf for name, child in children for place, leaf in leaves(child, name).items()}


def each_leaf(function: Callable[[Any], Any], tree: Any, named_tuple: Callable[[type], type] = lambda x: x) -> Any:
    """Apply a function to each leaf of a tree, and another to the type of each named tuple; `None` is a leaf."""
    if isinstance(tree, Mapping):
        return {key: each_leaf(function, child, named_tuple) for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return named_tuple(type(tree))(*(each_leaf(function, child, named_tuple) for child in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(each_leaf(function, child, named_tuple) for child in tree)
    return function(tree)


def is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of NumPy for a name that both frameworks use."""
    if name in np.sctypeDict:
        return np.dtype(name)
    import ml_dtypes

    if not hasattr(ml_dtypes, name):
        raise TypeError(f"dtype {name} has no equivalent in NumPy")
    return np.dtype(getattr(ml_dtypes, name))


def reference(x: Any, package: str) -> str | None:
    """The path of a class or function in one of the packages; None if it is not there."""
    module, name = getattr(x, "__module__", None) or "", getattr(x, "__name__", "")
    return f"{module.removeprefix(f'{package}.')}:{name}" if module.startswith(f"{package}.") else None


def resolve(place: str, package: str) -> Any:
    """The class or function at a path in a package.

    Raises:
        ValueError: there is none, or it belongs to another package.
    """
    module, _, name = place.partition(":")
    try:
        found = getattr(importlib.import_module(f"{package}.{module}"), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (reference(found, package) or "").endswith(
        f":{name}"
    ):  # a package may re-export a name from one of its files
        raise ValueError(f"{package} has no `{place}`; it was made by another version")
    return found


def twin(other: str, package: str) -> Callable[[type], type]:
    """The type of a state in the other package; any other named tuple stays the same."""

    def of(kind: type) -> type:
        place = reference(kind, other)
        return kind if place is None else resolve(place, package)

    return of


def pack(tree: Any, package: str, leaf: Callable[[str, Any], Packed], path: str = "") -> Packed:
    """The tree as plain containers, which name the types that they had.

    Args:
        tree: a tree of the package's framework.
        package: kdjax or kdtorch, whose states are packed.
        leaf: packs a leaf that is not a container, number or string, given its path and the leaf.
    """
    if tree is None or (isinstance(tree, bool | int | float | str) and not isinstance(tree, np.generic)):
        return tree
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        place = reference(type(tree), package)
        if place is None:
            raise TypeError(
                f"`{path or 'tree'}` is a {type(tree).__name__}, which the other framework does not have; {_KNOWN}"
            )
        fields = zip(tree._fields, tree, strict=True)
        return {"state": place, "fields": {k: pack(x, package, leaf, _join(path, k)) for k, x in fields}}
    if type(tree) is dict:
        if stray := [key for key in tree if not isinstance(key, str)]:
            raise TypeError(f"`{path or 'tree'}` must have strings as keys, got {stray[0]!r}")
        return {"dict": {k: pack(x, package, leaf, _join(path, k)) for k, x in tree.items()}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [pack(x, package, leaf, _join(path, str(i))) for i, x in enumerate(tree)]}
    if inspect.isfunction(tree) and (place := reference(tree, package)):
        return {"function": place}
    return leaf(path, tree)


def unpack(node: Packed, package: str, array: Callable[[np.ndarray], Any], module: Callable[[Packed], Any]) -> Any:
    """The tree that was packed, in the other framework or in the same.

    Args:
        node: the result of `pack`.
        package: kdjax or kdtorch, whose states the tree will have.
        array: converts a NumPy array to the framework's own.
        module: converts the node of a module to the module, or to its weights.
    """
    if isinstance(node, np.ndarray):
        return array(node)
    if not isinstance(node, dict):
        return node
    if "module" in node:
        return module(node)
    if "function" in node:
        return resolve(node["function"], package)

    def each(children: Any) -> Any:
        if isinstance(children, dict):
            return {key: unpack(x, package, array, module) for key, x in children.items()}
        return [unpack(x, package, array, module) for x in children]

    if "state" in node:
        return resolve(node["state"], package)(**each(node["fields"]))
    (kind, children), *_ = node.items()
    return tuple(each(children)) if kind == "tuple" else each(children)


def no_leaf(path: str, x: Any) -> TypeError:
    """The error for a leaf that cannot be converted."""
    return TypeError(f"`{path or 'tree'}` is a {type(x).__name__}, which cannot be converted; {_KNOWN}")


_KNOWN = (
    "supported are arrays, numbers, strings, states and modules of this library, and dicts, lists and tuples of them"
)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


class Layout(NamedTuple):
    """How a layout permutes the inputs and outputs of a channels-first module."""

    axes: int | None

    @classmethod
    def of(cls, function: str, layout: str | None) -> Layout:
        if layout not in (None, "NWC", "NHWC", "NDHWC"):
            raise ValueError(f'{function}: `layout` must be None, "NWC", "NHWC" or "NDHWC", got {layout!r}')
        return cls(len(layout) if layout else None)

    def channels_first(self, x: Any) -> Any:
        return self._moved(x, -1, 1)

    def channels_last(self, x: Any) -> Any:
        return self._moved(x, 1, -1)

    def _moved(self, x: Any, source: int, destination: int) -> Any:
        return x.movedim(source, destination) if getattr(x, "ndim", 0) == self.axes else x


def check_outputs(function: str, tree: Any, kind: type) -> None:
    """Check that all leaves of a tree are arrays of one kind, or None.

    Raises:
        TypeError: a leaf of another kind.
    """
    for name, x in leaves(tree).items():
        if not isinstance(x, kind) and (x is not None or not name):
            place = f"the output `{name}`" if name else "the output"
            raise TypeError(
                f"{function}: {place} must be an array or a tree of arrays, got {type(x).__name__}; return the part that "
                "you want, or select it with `output=`"
            )
