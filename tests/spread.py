"""Batches spread over devices or ranks, for the tests of both packages."""

import numpy as np

from parity.cases import KINDS, Loss, Sizes, along, draw

SIZES = Sizes(batch=(16,), classes=8, dim=6, num_data=32, negatives=5)
STEPS = 3  # for losses with a state
# unevenly masked over 2, 4 and 8 devices: one of the first two examples is kept, none of the seventh and eighth
UNEVEN = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1], bool)


def drawn(loss: Loss, where: np.ndarray | None = None) -> list[dict]:
    """The inputs of each step, with NaN in masked examples."""
    steps = draw(loss, SIZES, 0, STEPS if loss.state else 1)
    if where is None:
        return list(steps)

    def poison(x: np.ndarray, axis: int) -> np.ndarray:
        masked = (~where).reshape(-1, *[1] * (x.ndim - axis - 1))
        return np.where(masked, np.nan, x) if x.dtype.kind == "f" else x

    return [along(loss, inputs, poison) for inputs in steps]


def part(x: np.ndarray, axis: int, rank: int, ranks: int) -> np.ndarray:
    """The examples of one rank."""
    return np.split(x, ranks, axis)[rank]


def own(loss: Loss, inputs: dict, rank: int, ranks: int) -> dict:
    return along(loss, inputs, lambda x, axis: part(x, axis, rank, ranks))


def divided(kind: str) -> int | None:
    """The axis of the classes in an input, if ranks may have parts of it."""
    return {"logits": 1, "head": 0, "wide_head": 0, "bias": 0}.get(kind)


def spread(loss: Loss, name: str) -> bool:
    """Whether an input is spread over the ranks."""
    return KINDS[loss.inputs[name]].axis is not None
