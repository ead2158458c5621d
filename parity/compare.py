"""The distance of one result from another."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity.run import Result

# of (value, gradient), in units in the last place: of the value, and of the gradient's largest entry
ULP = {"float64": (64, 256), "float32": (16, 64)}


def ulps(got: Any, want: Any, dtype: str, scale: float = 0.0) -> float:
    """The largest error in ULP of the largest entry (of `scale`, if that is larger); inf where shapes, infinities or NaN do not agree."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return np.inf
    if not got.size:
        return 0.0
    finite = np.isfinite(want.astype(np.float64))
    if not np.array_equal(got[~finite].astype(np.float64), want[~finite].astype(np.float64)):
        return np.inf
    error = np.abs(got.astype(np.longdouble) - want.astype(np.longdouble))[finite].max(initial=0)
    scale = np.abs(want.astype(np.longdouble))[finite].max(initial=scale)
    if np.isnan(error):
        return np.inf
    return 0.0 if error == 0 else float(error / max(scale * np.finfo(dtype).eps, np.finfo(dtype).tiny))


def errors(got: Result, want: Result, dtype: str, scale: float = 0.0) -> dict[str, float]:
    """The error of each part of a result, in ULP of `dtype`, by a name such as `"value[0]"`.

    Gradients are measured against their largest entry, or `scale` if that is larger.
    """
    result = {}
    if len(got.values) != len(want.values) or len(got.states) != len(want.states):
        return {"number of steps": np.inf}
    for i, (value, wanted) in enumerate(zip(got.values, want.values, strict=True)):
        result[f"value[{i}]"] = ulps(value, wanted, dtype) if value.dtype == dtype else np.inf
    for part, ours, theirs in (("gradient", got.gradients, want.gradients), ("state", got.states, want.states)):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if set(a) != set(b):
                return {f"{part}[{i}] has {sorted(a)}, not {sorted(b)}": np.inf}
            for key in b:
                largest = max(scale, _largest(b[key])) if part == "gradient" else 0.0
                pairs = zip(_leaves(a[key]), _leaves(b[key]), strict=True)
                result[f"{part}[{i}].{key}"] = max(ulps(x, y, dtype, largest) for x, y in pairs)
    return result


def _leaves(x: Any) -> list[np.ndarray]:
    return x if isinstance(x, list) else [x]


def _largest(x: Any) -> float:
    return max(float(np.abs(leaf.astype(np.longdouble)).max(initial=0)) for leaf in _leaves(x))


def assert_close(got: Result, want: Result, dtype: str, scale: float = 0.0) -> None:
    """Raise an `AssertionError` that names each part that is too far."""
    value_limit, other_limit = ULP[dtype]
    far = {
        name: error
        for name, error in errors(got, want, dtype, scale).items()
        if not error <= (value_limit if name.startswith("value") else other_limit)
    }
    if far:
        raise AssertionError(
            f"in ULP of {dtype} (limits: value {value_limit}, gradient and state {other_limit}): "
            + ", ".join(f"{name} {error:.3g}" for name, error in far.items())
        )
