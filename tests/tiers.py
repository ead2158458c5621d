"""Decides which cases of a test run in `make test`, and which only in `make test-all`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from parity.row import Loss

slow = pytest.mark.slow


def first(count: int, values: Iterable[Any]) -> list[Any]:
    """Values of a parameter; all after the first `count` are marked slow."""
    return [_parameter(x, i < count) for i, x in enumerate(values)]


def only(quick: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Values of a parameter; those for which `quick` is False are marked slow."""
    return [_parameter(x, quick(x)) for x in values]


# cases whose rounding is that of the ordinary case, because only a shape or the reduction differs
OTHER_SHAPES = ("axes", "classes", "example", "none", "sum")

# one loss of rows, one of pairs of examples, one with a state, and one of feature maps
REPRESENTATIVES = ("kl_loss", "euclidean_mse_loss", "dino_loss", "hcl_loss")


def one_of_a_kind(losses: Iterable[Loss]) -> list[Any]:
    """Losses, with one of each kind in the first tier, for tests that compile programs; a kind shares its code."""
    return only(lambda loss: loss.name in REPRESENTATIVES, losses)


def _parameter(value: Any, quick: bool) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if quick else slow)
