"""What the recipes of language models share: lines of text that ship with Python, as arrays of bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

import numpy as np

LENGTH, BYTES = 40, 128
_text = (line.strip().encode("ascii", "ignore") for topic in topics.values() for line in topic.splitlines())
LINES = [line[:LENGTH] for line in _text if len(line) >= 8]


def batches(steps: int, seed: int = 0, size: int = 32) -> Iterator[np.ndarray]:
    """`[size, 40]`: bytes of lines, drawn anew for each step, and 0 after the end of a line."""
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        tokens = np.zeros((size, LENGTH), np.int64)
        for row, place in zip(tokens, draw.integers(len(LINES), size=size), strict=True):
            row[: len(LINES[place])] = np.frombuffer(LINES[place], np.uint8)
        yield tokens
