"""Shared by the recipes of language models: lines of text that ship with Python, as arrays of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pydoc_data.topics import topics

import numpy as np

LENGTH, BYTES = 40, 128
_text = (line.strip().encode("ascii", "ignore") for topic in topics.values() for line in topic.splitlines())
LINES = [line[:LENGTH] for line in _text if len(line) >= 8]


def rows(places: Iterable[int]) -> np.ndarray:
    """`[lines, 40]`: bytes of these lines, and 0 after the end of a line."""
    chosen = [LINES[place] for place in places]
    tokens = np.zeros((len(chosen), LENGTH), np.int64)
    for row, line in zip(tokens, chosen, strict=True):
        row[: len(line)] = np.frombuffer(line, np.uint8)
    return tokens


def batches(steps: int, seed: int = 0, size: int = 32) -> Iterator[np.ndarray]:
    """`[size, 40]`: bytes of random lines for each step, and 0 after the end of a line."""
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        yield rows(draw.integers(len(LINES), size=size))
