"""Thousands of steps of losses with a state, on ordinary and extreme batches in turn, in both packages."""

from __future__ import annotations

import pathlib
import resource
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from frameworks import JAX, TORCH

from parity.cases import LOSSES, Loss, Sizes, along, draw

SIZES = Sizes(batch=(3,), dim=4, views=2, num_data=12, negatives=3)
# the kinds of batches, in turn; most of them are ordinary
KINDS = ("ordinary", "masked NaN", "all masked", "zero", "constant", "large", "bad teacher", *["ordinary"] * 4)
STATEFUL = [loss for loss in LOSSES if loss.state]
WARM_UP = 0.3  # fraction of the steps before memory is measured


def batches(loss: Loss, steps: int) -> Iterator[tuple[str, dict[str, Any], np.ndarray]]:
    """The kind, inputs without the state, and mask of each step."""
    for step in range(steps):
        kind = KINDS[step % len(KINDS)]
        (inputs,) = draw(loss, SIZES, step)
        del inputs[str(loss.state)]
        where = np.arange(3) != step % 3 if kind == "masked NaN" else np.full(3, kind != "all masked")
        numbers = [k for k in inputs if inputs[k].dtype.kind == "f"]
        if kind in ("zero", "constant", "large"):
            factor, number = {"zero": (0, 0), "constant": (0, 1.5), "large": (1e4, 0)}[kind]
            inputs |= {k: factor * inputs[k] + number for k in numbers}
        if kind == "bad teacher":
            inputs |= {k: np.ones_like(x) for k, x in inputs.items() if x.dtype == bool}  # every patch is used
            inputs["teacher"][..., 1, 0] = [np.nan, np.inf][step % 2]
        masked = along(loss, {k: inputs[k] for k in numbers}, lambda x, axis, w=where: _spoilt(x, axis, w))
        yield kind, {**inputs, **masked}, where


def _spoilt(x: np.ndarray, axis: int, where: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.where(where.reshape(-1, *[1] * (x.ndim - 1)), np.moveaxis(x, axis, 0), np.nan), 0, axis)


def start(loss: Loss, kd: Any, array: Any) -> Any:
    (inputs,) = draw(loss, SIZES, 0)
    return getattr(kd, loss.inputs[str(loss.state)])(**{k: array(v) for k, v in inputs[str(loss.state)].items()})


def in_jax(loss: Loss, steps: int) -> tuple[np.ndarray, list[np.ndarray], float]:
    """The loss and the state of each step, computed with `scan` over 100 steps, and the growth of memory in MiB."""

    def step(state: Any, given: Any) -> tuple[Any, Any]:
        inputs, where = given
        arguments = (inputs[k] for k in loss.inputs if k != loss.state)  # jit has sorted them
        value, state = getattr(JAX.kd, loss.name)(*arguments, state, where=where)
        return state, (value, state)

    scan = jax.jit(lambda state, given: jax.lax.scan(step, state, given))
    state, before = start(loss, JAX.kd, JAX.array), 0.0
    values, states = _room(steps, state)
    drawn = [({k: JAX.array(v) for k, v in x.items()}, jnp.asarray(where)) for _, x, where in batches(loss, steps)]
    for i in range(0, steps, 100):
        if i >= WARM_UP * steps and not before:
            before = resident()
        state, result = scan(state, jax.tree.map(lambda *x: jnp.stack(x), *drawn[i : i + 100]))
        for kept, x in zip((values, *states), jax.tree.leaves(result), strict=True):
            kept[i : i + 100] = x
    return values, states, resident() - before


def in_torch(loss: Loss, steps: int) -> tuple[np.ndarray, list[np.ndarray], float]:
    state, before = start(loss, TORCH.kd, TORCH.array), 0.0
    values, states = _room(steps, state)
    for i, (_, inputs, where) in enumerate(batches(loss, steps)):
        if i >= WARM_UP * steps and not before:
            before = resident()
        given = [TORCH.array(x).requires_grad_(x.dtype.kind == "f") for x in inputs.values()]
        value, state = getattr(TORCH.kd, loss.name)(*given, state, where=torch.from_numpy(where))
        value.backward()
        for kept, x in zip((values, *states), (value, *state), strict=True):
            kept[i] = x.detach()
    return values, states, resident() - before


def _room(steps: int, state: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Arrays for the values and states of all steps, allocated at the start, so that they do not add to the growth."""
    return np.full(steps, np.nan), [np.full((steps, *x.shape), np.nan) for x in state]


def resident() -> float:
    """The resident memory of the process in MiB, or its maximum if the system does not report it."""
    status = pathlib.Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def check(loss: Loss, steps: int) -> dict[str, float]:
    """Run both packages, check every step, and return the figures."""
    kinds = np.array([kind for kind, *_ in batches(loss, steps)])
    results = {"jax": in_jax(loss, steps), "torch": in_torch(loss, steps)}
    stays = np.isin(kinds, ["bad teacher", "all masked"])
    for values, states, _ in results.values():
        assert np.array_equal(np.isnan(values), kinds == "bad teacher")
        assert (values[kinds == "all masked"] == 0).all()
        for x in states:
            assert np.isfinite(x).all()
            moved = np.flatnonzero(stays[1:]) + 1
            assert np.array_equal(x[moved], x[moved - 1])  # bit by bit
    ours, theirs = results["jax"], results["torch"]
    eps = np.finfo("float64").eps
    drift = max(
        float((np.abs(a - b) / max(1.0, float(np.abs(b).max()))).max()) for a, b in zip(ours[1], theirs[1], strict=True)
    )
    steady = kinds == "ordinary"
    apart = float((np.abs(ours[0] - theirs[0])[steady] / np.abs(theirs[0][steady])).max())
    return {
        "state": float(drift / eps),
        "value": float(apart / eps),
        "growth in JAX": ours[2],
        "growth in PyTorch": theirs[2],
    }
