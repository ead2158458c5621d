"""Which cases of a test are for `make test`, and which for `make test-all` alone."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from parity.row import Loss

slow = pytest.mark.slow


def first(count: int, values: Iterable[Any]) -> list[Any]:
    """Values of a parameter; those after the first `count` are slow."""
    return [_parameter(x, i < count) for i, x in enumerate(values)]


def only(quick: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Values of a parameter; those that `quick` is false for are slow."""
    return [_parameter(x, quick(x)) for x in values]


# of rows, of pairs of examples, with a state, of feature maps
REPRESENTATIVES = ("kl_loss", "euclidean_mse_loss", "dino_loss", "hcl_loss")


def one_of_a_kind(losses: Iterable[Loss]) -> list[Any]:
    """Losses; in the first tier one of each kind: what compiles programs holds for others of the kind by the same code."""
    return only(lambda loss: loss.name in REPRESENTATIVES, losses)


def _parameter(value: Any, quick: bool) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if quick else slow)
