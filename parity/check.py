"""Runs a case of the table in the frameworks and the oracle, and finds all differences between them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from parity.arrays import HALVES, rounded
from parity.cases import Case, each_array
from parity.compare import Difference, difference
from parity.run import Result, result_dtype, run

DTYPES = ("float64", "float32", "bfloat16", "float16")
Limits = tuple[float, float, float]
# limits of (value, gradient, state), in ULP. CRCD's normaliser, a mean of exp(20 x), multiplies the rounding of x by
# 20. The gradient of a half-precision input is in half precision too: one ULP is the rounding of both sides.
LIMITS: dict[str, Limits] = {
    "float64": (64, 256, 64),
    "float32": (16, 64, 64),
    "bfloat16": (16, 1, 64),
    "float16": (16, 1, 64),
}
UPCAST: Limits = (4, 1, 4)  # half-precision inputs against the same numbers in float32


def check(case: Case, dtype: str, frameworks: Sequence[str] = ("jax", "torch"), **packages: Any) -> list[Difference]:
    """Run a case in each framework; compare it with the oracle, half precision with float32, and the frameworks.

    Args:
        case: a case of the table.
        dtype: the dtype of the inputs, one of `DTYPES`.
        frameworks: some of `parity.run.FRAMEWORKS`.
        packages: by framework, another object that has the losses by their names.

    A framework that raises an error counts as a difference that has not passed.
    """
    names: dict[str, Any] = {"subject": case.loss.title, "case": case.name, "dtype": dtype}
    limits = case.bounds.get(dtype, LIMITS[dtype])
    want = run("oracle", case, dtype)
    results: dict[str, Result] = {}
    found: list[Difference] = []
    for framework in frameworks:
        package = packages.get(framework)
        try:
            result = run(framework, case, dtype, package=package)
            full = run(framework, upcast(case, dtype), "float32", package=package) if dtype in HALVES else None
        except ImportError:
            raise
        except Exception as error:
            problem = f"{framework} raised {type(error).__name__}: {error}"
            found.append(
                Difference(**names, one=framework, other="oracle", part="value", ulp=math.inf, problem=problem)
            )
            continue
        found += _parts(result, want, case, dtype, limits, (framework, "oracle"), names)
        if full:
            found += _parts(result, full, case, dtype, UPCAST, (framework, "float32"), names)
        for other, earlier in results.items():
            found += _parts(result, earlier, case, dtype, limits, (framework, other), names)
        results[framework] = result
    return found


def upcast(case: Case, dtype: str) -> Case:
    """The case with its inputs rounded to half precision, to be computed in float32."""
    steps = tuple(each_array(inputs, functools.partial(rounded, dtype=dtype)) for inputs in case.steps)
    return dataclasses.replace(case, steps=steps)


def _parts(
    one: Result,
    other: Result,
    case: Case,
    dtype: str,
    limits: Limits,
    sides: tuple[str, str],
    names: dict[str, Any],
) -> Iterator[Difference]:
    value, gradient, state = limits
    full = result_dtype(dtype)
    value_scale = max(case.value_scale, case.loss.scale)
    yield difference(
        one.values, other.values, limit=value, expected=full, scale=value_scale, names=sides, part="value", **names
    )
    yield difference(
        one.gradients,
        other.gradients,
        limit=gradient,
        expected=dtype,
        scale=max(case.scale, case.loss.gradient_scale),
        names=sides,
        part="gradient",
        **names,
    )
    if other.states:
        yield difference(one.states, other.states, limit=state, expected=full, names=sides, part="state", **names)
