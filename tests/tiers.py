"""Which cases of a test are for `make test`, and which for `make test-all` alone."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from parity.kinds import MAPS
from parity.row import Loss

slow = pytest.mark.slow


def first(count: int, values: Iterable[Any]) -> list[Any]:
    """Values of a parameter; those after the first `count` are slow."""
    return [_parameter(x, i < count) for i, x in enumerate(values)]


def only(quick: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Values of a parameter; those that `quick` is false for are slow."""
    return [_parameter(x, quick(x)) for x in values]


def one_of_a_kind(losses: Iterable[Loss]) -> list[Any]:
    """Losses; in the first tier the first of each kind: what compiles programs holds for others of the kind by the same code."""
    seen = set()

    def new(loss: Loss) -> bool:
        kind = loss.batch_coupled, loss.state, bool(MAPS & set(loss.inputs.values()))
        return not (kind in seen or seen.add(kind))

    return only(new, losses)


def _parameter(value: Any, quick: bool) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if quick else slow)
