"""The forms of a workload: a function without arguments that runs it forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.workloads import Workload
from parity.arrays import each_array
from parity.kinds import MAPS
from parity.row import Loss

FORMS = ("direct", "direct-compiled", "torch", "compiled", "jax")


class Outcome(NamedTuple):
    """The value, and the gradients of each input, each a list of arrays."""

    value: np.ndarray
    gradients: dict[str, list[np.ndarray]]


class Form(NamedTuple):
    """The function that is timed, and one that converts its result to an `Outcome`."""

    step: Callable[[], Any]
    outcome: Callable[[Any], Outcome]
    bytes_of_program: int | None = None


def form(name: str, workload: Workload) -> Form:
    return _jax(workload) if name == "jax" else _torch(workload, name)


def _torch(workload: Workload, name: str) -> Form:
    import torch

    import kdtorch
    from benchmarks import direct

    loss = workload.loss
    dtype = getattr(torch, workload.benchmark.dtype)
    where = None if workload.where is None else torch.from_numpy(workload.where)
    plain = name.startswith("direct")
    function = _kept(getattr(direct, loss.name), where) if plain else getattr(kdtorch, loss.name)
    if name.endswith("compiled"):
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=not plain, dynamic=False)
    options = workload.benchmark.options | ({} if plain or where is None else {"where": where})
    arrays = each_array(workload.inputs(), lambda x: torch.from_numpy(x).to(dtype if x.dtype.kind == "f" else None))
    inputs = _with_state(kdtorch, loss, arrays)
    learned = [x for key in loss.learns for x in _list(inputs[key])]
    for x in learned:
        x.requires_grad_()

    def step() -> Any:
        value = function(*inputs.values(), **options)
        value = value[0] if isinstance(value, tuple) else value
        return value.detach(), torch.autograd.grad(value, learned) if learned else ()

    def outcome(result: Any) -> Outcome:
        slopes = iter(x.float().numpy() for x in result[1])
        gradients = {k: [next(slopes) for _ in _list(inputs[k])] for k in loss.learns}
        return Outcome(result[0].numpy(), gradients)

    return Form(step, outcome)


def _kept(function: Callable[..., Any], where: Any) -> Callable[..., Any]:
    """The direct form for half precision and masks, as usually written: convert to float32, index the kept examples."""

    def of_kept(*inputs: Any, **options: Any) -> Any:
        arrays = [x.float() if hasattr(x, "is_floating_point") and x.is_floating_point() else x for x in inputs]
        return function(*(arrays if where is None else [x[where] for x in arrays]), **options)

    return of_kept


def _jax(workload: Workload) -> Form:
    import jax
    import jax.numpy as jnp

    import kdjax

    loss = workload.loss
    maps = [k for k, kind in loss.inputs.items() if kind in MAPS]
    drawn = workload.inputs()
    drawn |= each_array({k: drawn[k] for k in maps}, lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    dtype = workload.benchmark.dtype
    arrays = each_array(drawn, lambda x: jnp.asarray(x, dtype if x.dtype.kind == "f" else None))
    inputs = _with_state(kdjax, loss, arrays)
    options = workload.benchmark.options | ({} if workload.where is None else {"where": jnp.asarray(workload.where)})

    def objective(learned: dict[str, Any], fixed: dict[str, Any]) -> Any:
        arguments = {**learned, **fixed}
        value = getattr(kdjax, loss.name)(*(arguments[k] for k in loss.inputs), **options)
        return value if isinstance(value, tuple) else (value, None)

    learned = {k: x for k, x in inputs.items() if k in loss.learns}
    fixed = {k: x for k, x in inputs.items() if k not in loss.learns}
    differentiated = jax.value_and_grad(objective, has_aux=True)
    function = differentiated if learned else lambda learned, fixed: (objective(learned, fixed), {})
    program = jax.jit(function).lower(learned, fixed).compile()

    def step() -> Any:
        return jax.block_until_ready(program(learned, fixed))

    def outcome(result: Any) -> Outcome:
        (value, _), gradients = result
        arrays = {k: [np.asarray(x, np.float32) for x in _list(v)] for k, v in gradients.items()}
        return Outcome(
            np.asarray(value), arrays | {k: [np.moveaxis(x, -1, 1) for x in arrays[k]] for k in maps if k in arrays}
        )

    analysis = program.memory_analysis()
    held = analysis.temp_size_in_bytes + analysis.output_size_in_bytes if analysis else None
    return Form(step, outcome, held)


def _with_state(package: Any, loss: Loss, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, with the state in the package's own type."""
    return inputs | (
        {loss.state: getattr(package, loss.inputs[loss.state])(**inputs[loss.state])} if loss.state else {}
    )


def floor(workload: Workload) -> Callable[[], Any]:
    """A lower bound: reads inputs and writes gradients once, by copying the trained inputs and summing the rest."""
    import torch

    inputs, loss = workload.inputs(), workload.loss
    dtype = getattr(torch, workload.benchmark.dtype)
    learned = [torch.from_numpy(x).to(dtype) for k in loss.learns for x in _list(inputs[k])]
    rest = [
        torch.from_numpy(x).to(dtype if x.dtype.kind == "f" else None)
        for k, v in inputs.items()
        if k not in (*loss.learns, loss.state)
        for x in _list(v)
    ]
    copies = [torch.empty_like(x) for x in learned]

    def step() -> None:
        for copy, x in zip(copies, learned, strict=True):
            copy.copy_(x)
        for x in rest:
            x.sum()

    return step


def check(name: str, got: Outcome, want: Outcome, limit: float = 1e-3) -> None:
    """Raise an error if the value or a gradient differs from that of the direct form by more than the limit."""
    pairs = [("value", got.value, want.value)]
    pairs += [
        (f"gradient of {key}", a, b)
        for key, gradient in want.gradients.items()
        for a, b in zip(got.gradients[key], gradient, strict=True)
    ]
    for what, a, b in pairs:
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error <= limit:
            raise AssertionError(
                f"{name}: the {what} differs from the direct form's by {error:.1e} of its largest entry"
            )


def _list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]
