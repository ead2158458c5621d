"""Compares two results, and prints the differences as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from kdlosses.trees import is_array, leaves, numpy_dtype
from parity.arrays import is_float

PARTS = ("value", "gradient", "state", "setting")


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of one part of two results, at its worst entry.

    Attributes:
        subject: what was compared: a loss, a function or a layer.
        case: on which inputs.
        dtype: of the inputs.
        one: the side that is checked.
        other: the side that it is compared with.
        part: `"value"`, `"gradient"` or `"state"`; `"setting"` for a setting of a layer that differs.
        leaf: the path of the worst array in its tree.
        index: of the worst entry in that array.
        ours: the number of the side that is checked.
        theirs: the number of the other side.
        ulp: their distance in units in the last place of the array's largest entry, in the dtype of the result; inf
            where the two cannot be compared.
        relative: their distance over the array's largest entry.
        limit: of `ulp`.
        problem: why they cannot be compared, if they cannot.

    >>> from parity import Difference
    >>> place = {"subject": "std", "case": "", "dtype": "float32", "part": "value"}
    >>> print(Difference(**place, one="jax", other="torch", problem="shape: jax [2], torch [3]"))
    std float32: value: shape: jax [2], torch [3]
    """

    subject: str
    case: str
    dtype: str
    one: str
    other: str
    part: str
    leaf: str = ""
    index: tuple[int, ...] = ()
    ours: float = 0.0
    theirs: float = 0.0
    ulp: float = 0.0
    relative: float = 0.0
    limit: float = 0.0
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is within its limit."""
        return self.ulp <= self.limit

    def __str__(self) -> str:
        place = f" {self.leaf}" if self.leaf else ""
        head = f"{' '.join(x for x in (self.subject, self.case, self.dtype) if x)}: {self.part}{place}"
        if self.problem:
            return f"{head}: {self.problem}"
        where = str(list(self.index)) if self.index else ""
        return (
            f"{head}{where}: {self.one} {self.ours!r}, {self.other} {self.theirs!r}: "
            f"{self.ulp:.3g} ULP (limit {self.limit:g}), {self.relative:.1e} of the largest entry"
        )


def difference(
    one: Any,
    other: Any,
    *,
    limit: float,
    expected: str | None = None,
    scale: float = 0.0,
    names: tuple[str, str] = ("jax", "torch"),
    **where: Any,
) -> Difference:
    """Compare two trees of arrays: the same leaves, shapes, dtypes, infinities, and numbers within `limit` ULP.

    Args:
        one: the tree that is checked, of NumPy arrays.
        other: the tree that it is compared with.
        limit: in ULP of the largest entry of each array of `other`, in the array's dtype.
        expected: the dtype that the arrays of `one` must have; by default that of `other`'s.
        scale: the smallest number to use as the largest entry.
        names: of the two sides.
        where: the other fields of `Difference`.
    """
    result = Difference(one=names[0], other=names[1], limit=limit, **where)
    ours, theirs = leaves(one), leaves(other)
    if ours.keys() != theirs.keys():
        missing = [
            f"{name} lacks {', '.join(repr(key) for key in lacks)}"
            for name, lacks in zip(names, (theirs.keys() - ours.keys(), ours.keys() - theirs.keys()), strict=True)
            if lacks
        ]
        return dataclasses.replace(result, ulp=math.inf, problem="the trees differ: " + " and ".join(missing))
    worst = result
    for leaf in ours:
        found = _leaf(dataclasses.replace(result, leaf=leaf), ours[leaf], theirs[leaf], expected, scale)
        if found.problem:
            return found
        worst = found if not worst.leaf or found.ulp > worst.ulp else worst
    return worst


def _leaf(result: Difference, ours: Any, theirs: Any, expected: str | None, scale: float) -> Difference:
    names = (result.one, result.other)

    def incomparable(problem: str) -> Difference:
        return dataclasses.replace(result, ulp=math.inf, relative=math.inf, problem=problem)

    for name, x in zip(names, (ours, theirs), strict=True):
        if not is_array(x):
            return incomparable(f"{name} gives {_brief(x)}, which is not an array")
    if ours.shape != theirs.shape:
        return incomparable(f"shape: {names[0]} {list(ours.shape)}, {names[1]} {list(theirs.shape)}")
    wanted = expected if expected and is_float(theirs) else str(theirs.dtype)
    if str(ours.dtype) != wanted and not (expected is None and _both_integers(ours, theirs)):
        return incomparable(f"dtype: {names[0]} {ours.dtype}, {'expected' if expected else names[1]} {wanted}")
    if ours.dtype.kind == "c":
        return incomparable(f"complex numbers ({ours.dtype}) are not compared: return their real and imaginary parts")
    if not ours.size:
        return result
    a, b = ours.astype(np.longdouble), theirs.astype(np.longdouble)
    if is_float(ours):  # a number that is too large for a dtype is infinite in it
        b = np.where(np.abs(b) > np.longdouble(ml_dtypes.finfo(numpy_dtype(wanted)).max), np.copysign(np.inf, b), b)
    with np.errstate(invalid="ignore"):  # inf - inf; NaN is never right
        error = np.where(np.isfinite(a) & np.isfinite(b), np.abs(a - b), np.where(a == b, 0, np.inf))
    at = np.unravel_index(np.argmax(error), error.shape)
    largest = max(np.abs(b)[np.isfinite(b)].max(initial=0), scale)
    unit = _unit(float(largest), wanted) if is_float(ours) else 0.0  # an integer is right or wrong
    return dataclasses.replace(
        result,
        index=tuple(int(i) for i in at),
        ours=float(a[at]),
        theirs=float(b[at]),
        ulp=_over(float(error[at]), unit),
        relative=_over(float(error[at]), float(largest)),
    )


def _over(error: float, unit: float) -> float:
    return error / unit if error and unit else math.inf if error else 0.0


def _unit(largest: float, dtype: str) -> float:
    """One unit in the last place of the largest entry. Numbers that XLA flushes to zero do not count as errors."""
    info = ml_dtypes.finfo(numpy_dtype(dtype))
    floor = info.smallest_subnormal if dtype == "float16" else info.tiny
    return max(largest * float(info.eps), float(floor))


def _both_integers(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether both are integers: JAX has int32 where PyTorch has int64."""
    return a.dtype.kind in "iu" and b.dtype.kind in "iu"


def _brief(x: Any) -> str:
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def ulps(got: Any, want: Any, dtype: str) -> float:
    """The largest error in ULP of the largest entry, after both are rounded to `dtype`."""
    got, want = (np.asarray(x).astype(numpy_dtype(dtype)) for x in (got, want))
    return difference(got, want, limit=0, expected=dtype, subject="", case="", dtype=dtype, part="value").ulp


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences. Printed, they are a table of the worst by subject and dtype, followed by those that exceed their limit.

    Attributes:
        differences: all that were computed, also those that are 0.
        note: a line to print below the table.

    >>> from parity import Comparison
    >>> Comparison(()).passed  # nothing was compared
    False
    """

    differences: tuple[Difference, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether something was compared and everything is within its limits."""
        return bool(self.differences) and not self.failures

    @property
    def failures(self) -> tuple[Difference, ...]:
        """The differences that exceed their limit."""
        return tuple(x for x in self.differences if not x.passed)

    def rows(self) -> Iterator[tuple[str, str, dict[tuple[str, str], Difference]]]:
        """The rows of the table.

        Returns:
            Subject, dtype, and the worst difference by (other side, part); the worst is the one closest to its limit.
        """
        for subject, dtype in dict.fromkeys((x.subject, x.dtype) for x in self.differences):
            cells: dict[tuple[str, str], Difference] = {}
            for x in self.differences:
                if (x.subject, x.dtype) == (subject, dtype):
                    key = (x.other, x.part)
                    cells[key] = worst((cells[key], x)) if key in cells else x
            yield subject, dtype, cells

    def columns(self) -> list[tuple[str, str]]:
        """The columns of the table.

        Returns:
            (other side, part), for those that exist.
        """
        present = {(x.other, x.part) for x in self.differences}
        others = dict.fromkeys(x.other for x in self.differences)
        return [(other, part) for other in others for part in PARTS if (other, part) in present]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="Worst error: ULP of the largest entry, and relative to it", title_justify="left")
        table.add_column("")
        table.add_column("inputs")
        columns = self.columns()
        for other, part in columns:
            table.add_column(f"{part}\nto {other}", justify="right", no_wrap=True)
        for subject, dtype, cells in self.rows():
            table.add_row(subject, dtype, *(_cell(cells.get(column)) for column in columns))
        yield table
        for failure in self.failures:
            yield Text(str(failure), style="red", overflow="fold")
        if self.note:
            yield Text(self.note, style="bold red")
        verdict = f"{len(self.failures)} over their limit" if self.failures else "all within their limits"
        yield Text(f"{len(self.differences)} comparisons, {verdict}", style="bold green" if self.passed else "bold red")

    def __str__(self) -> str:
        console = Console(width=160, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def worst(differences: Iterable[Difference]) -> Difference:
    """The difference that exceeds its limit most, or is closest to it."""
    return max(differences, key=lambda x: (not x.passed, x.ulp / x.limit if x.limit else x.ulp))


def _cell(x: Difference | None) -> Text:
    if x is None:
        return Text("")
    text = "✗" if x.problem else f"{x.ulp:.2g}" + (f" {x.relative:.0e}" if x.ulp else "")
    return Text(text, style="" if x.passed else "bold red")
