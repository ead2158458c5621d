"""Compares the values and gradients of two functions, one in JAX and one in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdlosses.trees import each_leaf, is_array, leaves, numpy_dtype
from parity.arrays import is_float, jax_array, to_numpy, torch_tensor
from parity.compare import Comparison, Difference, difference

# limits of (value, gradient), in ULP: both sides round, and neither is an oracle
LIMITS = {"float64": (64, 256), "float32": (64, 256), "bfloat16": (4, 16), "float16": (4, 16)}


class NotAnArrayError(TypeError):
    """An output that cannot be compared."""


def compare(
    jax_fn: Callable[..., Any],
    torch_fn: Callable[..., Any],
    *inputs: Any,
    grad: bool = True,
    dtypes: Sequence[str] = ("float64", "float32"),
    limits: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
) -> Comparison:
    """Run a function of JAX and one of PyTorch on the same inputs and compare their outputs.

    It compares the trees of the outputs, their shapes, dtypes and values, and the gradients of every floating-point
    input: the vector-Jacobian products for one random cotangent.

    Args:
        jax_fn: takes the inputs as JAX arrays. It is called without `jit`; wrap it in `jax.jit` to compare the compiled
            function.
        torch_fn: takes the inputs as tensors on the CPU.
        inputs: NumPy arrays, or trees of them (dicts, lists, tuples, named tuples). Floating-point arrays are cast to
            each of `dtypes`, integers are int32 in JAX and stay as they are in PyTorch.
        grad: whether to compare gradients.
        dtypes: of the inputs; JAX computes in 64 bits where it is float64.
        limits: of (value, gradient) by dtype, in ULP of the largest entry of each array; the defaults are (64, 256) in
            float64 and float32, (4, 16) in bfloat16 and float16.
        seed: of the cotangent.

    Returns:
        A `Comparison`: `.passed`, `.failures`, and a table when printed, with the position and both numbers of the
        worst entry of everything that exceeds its limit.

    Raises:
        TypeError: an input or an output that is not an array; the message names the side and the leaf.
        ValueError: an unknown dtype.
        RuntimeError: a function raised; the message names the side and the cause.

    >>> import jax.numpy as jnp, numpy as np, torch
    >>> from parity import compare
    >>> x = np.array([[1.0, 2.0, 3.0]])
    >>> compare(lambda x: jnp.std(x), lambda x: torch.std(x), x).passed  # of the population, of a sample
    False
    >>> compare(lambda x: jnp.std(x, ddof=1), lambda x: torch.std(x), x).passed
    True
    """
    inputs, limits = checked_arguments("compare", inputs, dtypes, limits)
    subject = _name(torch_fn)
    found: list[Difference] = []
    for dtype in dtypes:
        value_limit, gradient_limit = limits[dtype]
        (ours, our_slopes), (theirs, their_slopes) = (
            side(function, inputs, dtype, grad, seed) for side, function in ((_jax, jax_fn), (_torch, torch_fn))
        )
        where = {"subject": subject, "case": "", "dtype": dtype}
        found += by_leaf(ours, theirs, limit=value_limit, part="value", **where)
        if grad:
            found += by_leaf(our_slopes, their_slopes, limit=gradient_limit, part="gradient", **where)
    return Comparison(tuple(found))


def assert_parity(jax_fn: Callable[..., Any], torch_fn: Callable[..., Any], *inputs: Any, **options: Any) -> None:
    """Raise an `AssertionError` with the table of `compare`, unless everything is within the limits.

    Args:
        jax_fn: takes the inputs as JAX arrays.
        torch_fn: takes the inputs as tensors on the CPU.
        inputs: NumPy arrays, or trees of them.
        options: of `compare`: `grad`, `dtypes`, `limits`, `seed`.

    Raises:
        AssertionError: something exceeds its limit.
        TypeError: an input or an output that is not an array; the message names the side and the leaf.
        ValueError: an unknown dtype.
        RuntimeError: a function raised; the message names the side and the cause.

    >>> import jax, numpy as np, torch
    >>> from parity import assert_parity
    >>> assert_parity(jax.nn.softplus, torch.nn.functional.softplus, np.linspace(-5, 5, 11))
    """
    comparison = compare(jax_fn, torch_fn, *inputs, **options)
    if not comparison.passed:
        raise AssertionError(f"\n{comparison}")


def by_leaf(ours: Any, theirs: Any, **fields: Any) -> Iterator[Difference]:
    """A difference for each leaf, or a single one that says how the trees differ."""
    ours, theirs = leaves(ours), leaves(theirs)
    if ours.keys() != theirs.keys():
        yield difference(ours, theirs, **fields)
        return
    for leaf in ours:
        yield difference({leaf: ours[leaf]}, {leaf: theirs[leaf]}, **fields)


def cotangent(leaf: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A cotangent that is the same on both sides, with values that every dtype can represent."""
    rng = np.random.default_rng([seed, *leaf.encode()])
    return rng.integers(-8, 9, size=shape).astype(np.float64) / 8


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Let JAX compute in 64 bits if the dtype is float64."""
    import jax

    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        yield


def _jax(function: Callable[..., Any], inputs: tuple[Any, ...], dtype: str, grad: bool, seed: int) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    def array(x: np.ndarray) -> Any:
        return jax_array(x.astype(numpy_dtype(dtype)) if is_float(x) else x, dtype)

    with precision(dtype):
        given = each_leaf(array, inputs)
        floats = {leaf: x for leaf, x in leaves(given).items() if is_float(x)}

        def floating(floats: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            with named("JAX", function, dtype):
                result = checked_outputs("JAX", function, leaves(function(*with_leaves(given, floats))))
            result = {leaf: jnp.asarray(x) for leaf, x in result.items()}
            return {leaf: x for leaf, x in result.items() if is_float(x)}, {
                leaf: x for leaf, x in result.items() if not is_float(x)
            }

        if not grad:
            outputs, others = floating(floats)
            return _numpy({**outputs, **others}), {}
        outputs, pull_back, others = jax.vjp(floating, floats, has_aux=True)
        above = {leaf: jnp.asarray(cotangent(leaf, x.shape, seed), x.dtype) for leaf, x in outputs.items()}
        (slopes,) = pull_back(above)
        return _numpy({**outputs, **others}), _numpy(slopes)


def _torch(function: Callable[..., Any], inputs: tuple[Any, ...], dtype: str, grad: bool, seed: int) -> tuple[Any, Any]:
    given = each_leaf(lambda x: torch_tensor(x, dtype), inputs)
    floats = {leaf: x.requires_grad_(grad) for leaf, x in leaves(given).items() if is_float(x)}
    with named("PyTorch", function, dtype):
        outputs = checked_outputs("PyTorch", function, leaves(function(*given)))
        above = {leaf: cotangent(leaf, tuple(x.shape), seed) for leaf, x in outputs.items()}
        slopes = pulled_back(outputs, floats, above) if grad else {}
    return _numpy(outputs), slopes


def pulled_back(
    outputs: Mapping[str, Any], inputs: Mapping[str, Any], above: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """PyTorch's gradients of the inputs for a cotangent; 0 for an input that no output depends on."""
    import torch

    differentiable = {
        leaf: x for leaf, x in outputs.items() if x.requires_grad and leaf in above and above[leaf].shape == x.shape
    }
    slopes: Sequence[Any] = [None] * len(inputs)
    if differentiable and inputs:
        upstream = [torch_tensor(above[leaf], "float64").to(x) for leaf, x in differentiable.items()]
        slopes = torch.autograd.grad(list(differentiable.values()), list(inputs.values()), upstream, allow_unused=True)
    return {
        leaf: to_numpy(torch.zeros_like(x) if slope is None else slope)
        for (leaf, x), slope in zip(inputs.items(), slopes, strict=True)
    }


def with_leaves(tree: Any, new: Mapping[str, Any]) -> Any:
    """The tree with some of its leaves replaced."""
    places = iter(leaves(tree))
    return each_leaf(lambda x: new.get(next(places), x), tree)


def checked_outputs(side: str, function: Any, outputs: Mapping[str, Any]) -> dict[str, Any]:
    for leaf, x in outputs.items():
        if not is_array(x):
            place = f"output {leaf!r}" if leaf else "the output"
            raise NotAnArrayError(
                f"compare: {place} of the {side} function {_name(function)} must be an array, got {type(x).__name__} {x!r}"
            )
    return dict(outputs)


@contextlib.contextmanager
def named(side: str, function: Any, dtype: str, besides: str = "") -> Iterator[None]:
    """Turn an error into one that says which side raised it, on which inputs, and `besides`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NotAnArrayError):
            raise
        message = f"compare: the {side} function {_name(function)} raised {type(error).__name__} on {dtype} inputs: {error}{besides}"
        raise RuntimeError(message) from error


def checked_arguments(
    name: str, inputs: tuple[Any, ...], dtypes: Sequence[str], limits: Mapping[str, tuple[float, float]] | None
) -> tuple[tuple[Any, ...], Mapping[str, tuple[float, float]]]:
    """The inputs as NumPy arrays, and the limits of every dtype."""
    if isinstance(dtypes, str):
        raise ValueError(f'{name}: `dtypes` must be a list of names, got the name alone: write dtypes=["{dtypes}"]')
    for dtype in dtypes:
        if dtype not in LIMITS:
            raise ValueError(f"{name}: `dtypes` must be of {', '.join(LIMITS)}, got {dtype!r}")
    for i, tree in enumerate(inputs):
        for leaf, x in leaves(tree, f"inputs[{i}]").items():
            if not is_array(x):
                raise TypeError(
                    f"{name}: `{leaf}` must be a NumPy array, got {type(x).__name__} {x!r}; "
                    "use closures in both functions for what is not an array"
                )
    return each_leaf(to_numpy, inputs), {**LIMITS, **(limits or {})}


def _numpy(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {leaf: to_numpy(x) for leaf, x in tree.items()}


def _name(function: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return "function" if name == "<lambda>" else name
