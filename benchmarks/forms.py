"""The four forms of a workload: a function without arguments that runs it forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.workloads import Workload

FORMS = ("direct", "torch", "compiled", "jax")


class Outcome(NamedTuple):
    """The value, and the gradients by input."""

    value: np.ndarray
    gradients: dict[str, Any]


class Form(NamedTuple):
    """What is timed, and what it gave."""

    step: Callable[[], Any]
    outcome: Callable[[Any], Outcome]
    bytes_of_program: int | None = None


def form(name: str, workload: Workload) -> Form:
    return _jax(workload) if name == "jax" else _torch(workload, name)


def _torch(workload: Workload, name: str) -> Form:
    import torch

    import kdtorch
    from benchmarks import direct

    function = getattr(direct if name == "direct" else kdtorch, workload.loss)
    if name == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    inputs = _each(workload.inputs(), torch.from_numpy)
    if "state" in inputs:
        inputs["state"] = _state(kdtorch, workload)(**inputs["state"])
    learned = [x for key in workload.learns for x in _list(inputs[key])]
    for x in learned:
        x.requires_grad_()

    def step() -> Any:
        value = function(*inputs.values(), **workload.options)
        value = value[0] if isinstance(value, tuple) else value
        return value.detach(), torch.autograd.grad(value, learned)

    def outcome(result: Any) -> Outcome:
        gradients = iter(result[1])
        by_name = {k: _each(inputs[k], lambda _: next(gradients).numpy()) for k in workload.learns}
        return Outcome(result[0].numpy(), by_name)

    return Form(step, outcome)


def _jax(workload: Workload) -> Form:
    import jax
    import jax.numpy as jnp

    import kdjax

    drawn = workload.inputs()
    if workload.loss == "hcl_loss":
        drawn = _each(drawn, lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    inputs = _each(drawn, jnp.asarray)
    if "state" in inputs:
        inputs["state"] = _state(kdjax, workload)(**inputs["state"])
    order = list(inputs)

    def objective(learned: dict[str, Any], fixed: dict[str, Any]) -> Any:
        value = getattr(kdjax, workload.loss)(*({**learned, **fixed}[k] for k in order), **workload.options)
        return value if isinstance(value, tuple) else (value, None)

    learned = {k: x for k, x in inputs.items() if k in workload.learns}
    fixed = {k: x for k, x in inputs.items() if k not in workload.learns}
    program = jax.jit(jax.value_and_grad(objective, has_aux=True)).lower(learned, fixed).compile()

    def step() -> Any:
        return jax.block_until_ready(program(learned, fixed))

    def outcome(result: Any) -> Outcome:
        (value, _), gradients = result
        back = (lambda x: np.moveaxis(np.asarray(x), -1, 1)) if workload.loss == "hcl_loss" else np.asarray
        return Outcome(np.asarray(value), _each(gradients, back))

    analysis = program.memory_analysis()
    held = analysis.temp_size_in_bytes + analysis.output_size_in_bytes if analysis else None
    return Form(step, outcome, held)


def floor(workload: Workload) -> Callable[[], Any]:
    """Reads the inputs and writes the gradients, once: copies what is learned and sums the rest."""
    import torch

    inputs = workload.inputs()
    learned = [torch.from_numpy(x) for k in workload.learns for x in _list(inputs[k])]
    rest = [torch.from_numpy(x) for k, v in inputs.items() if k not in (*workload.learns, "state") for x in _list(v)]
    copies = [torch.empty_like(x) for x in learned]

    def step() -> None:
        for copy, x in zip(copies, learned, strict=True):
            copy.copy_(x)
        for x in rest:
            x.sum()

    return step


def check(name: str, got: Outcome, want: Outcome) -> None:
    """Raise unless value and gradients are those of the direct form, to what float32 keeps of it."""
    pairs = [("value", got.value, want.value)]
    pairs += [
        (f"gradient of {key}", a, b)
        for key, gradient in want.gradients.items()
        for a, b in zip(_list(got.gradients[key]), _list(gradient), strict=True)
    ]
    for what, a, b in pairs:
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error <= 1e-3:
            raise AssertionError(
                f"{name}: the {what} differs from the direct form's by {error:.1e} of its largest entry"
            )


def _state(package: Any, workload: Workload) -> Any:
    return getattr(package, {"dino_loss": "DINOState", "crcd_loss": "CRCDState"}[workload.loss])


def _list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def _each(x: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(x, dict):
        return {key: _each(value, function) for key, value in x.items()}
    if isinstance(x, list):
        return [_each(value, function) for value in x]
    return function(np.asarray(x) if isinstance(x, np.generic) else x)
