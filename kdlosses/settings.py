"""Checks of a module's settings when it is built; values of arrays, which may be traced or learned, are not checked."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any


def positive(**settings: Any) -> None:
    _check(settings, "finite and greater than 0", lambda x: 0 < x < math.inf)


def non_negative(**settings: Any) -> None:
    _check(settings, "finite and at least 0", lambda x: 0 <= x < math.inf)


def fraction(**settings: Any) -> None:
    _check(settings, "between 0 and 1", lambda x: 0 <= x <= 1)


def _check(settings: dict[str, Any], expected: str, test: Callable[[Any], bool]) -> None:
    for name, value in settings.items():
        if not (test(value) if isinstance(value, numbers.Real) else hasattr(value, "shape")):
            raise ValueError(f"`{name}` must be {expected}, got {value!r}")


def whole(least: int, **settings: Any) -> None:
    for name, value in settings.items():
        if not is_whole(value, least):
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")


def is_whole(value: Any, least: int) -> bool:
    return hasattr(value, "__index__") and operator.index(value) >= least


def map_size(size: Any, name: str = "out_shapes") -> tuple[int, int] | None:
    """Height and width of a map, given as two numbers, or as one for both."""
    if size is None:
        return None
    both = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(both) != 2 or not all(is_whole(x, 1) for x in both):
        raise ValueError(f"`{name}` must be a whole number of at least 1, or height and width, got {size!r}")
    return operator.index(both[0]), operator.index(both[1])


def map_sizes(sizes: Any, number: int) -> tuple[tuple[int, int] | None, ...] | None:
    """Height and width of each of `number` maps."""
    if sizes is None:
        return None
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) != number:
        raise ValueError(f"`out_shapes` must have one size per map, {number} in all, got {sizes!r}")
    return tuple(map_size(size, f"out_shapes[{i}]") for i, size in enumerate(sizes))


def common_divisor(name: str, number: int, *sizes: int) -> int:
    """`number`, or an error if it does not divide all the sizes, which are those of the last axes of arrays."""
    if number < 1 or any(size % number for size in sizes):
        both = math.gcd(*sizes)
        divisors = [n for n in range(1, both + 1) if both % n == 0]
        raise ValueError(
            f"`{name}` must divide the last axes of student and teacher, of sizes {' and '.join(map(str, sizes))}, got {number}; "
            f"give one of {', '.join(map(str, divisors))}"
        )
    return number
