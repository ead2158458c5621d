"""Shared by the recipes of two tokenizers: the tokenizers, and the places where both have read the same text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from _text import LINES
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = [line.decode() for line in LINES[:1200]]
TRAIN, TEST = TEXTS[200:], TEXTS[:200]
LENGTH = 40


@cache
def tokenizer(size: int) -> Tokenizer:
    """Byte pairs learned from the lines; token 0 is padding."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>"], show_progress=False))
    return made


def shared_places(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of positions after which both have read the same text, found from the text spans of their tokens.

    The logits at these positions predict what follows the same text. The ends of a line are not a pair, because nothing
    follows.
    """
    places = {end: place for place, (_, end) in enumerate(theirs[:-1])}
    return [(place, places[end]) for place, (_, end) in enumerate(ours[:-1]) if end in places]


def aligned(texts: list[str], student: Tokenizer, teacher: Tokenizer) -> dict[str, np.ndarray]:
    """Tokens of both, `[texts, 40]`, and the shared places in each, `[texts, 40]`; `where` is False for padding."""
    names = ("student", "teacher", "student_places", "teacher_places")
    arrays = {name: np.zeros((len(texts), LENGTH), np.int64) for name in names}
    where = np.zeros((len(texts), LENGTH), bool)
    for row, text in enumerate(texts):
        ours, theirs = student.encode(text), teacher.encode(text)
        pairs = np.array(shared_places(ours.offsets, theirs.offsets), np.int64).reshape(-1, 2)
        for name, values in zip(names, (ours.ids, theirs.ids, *pairs.T), strict=True):
            arrays[name][row, : len(values)] = values
        where[row, : len(pairs)] = True
    return {**arrays, "where": where}


def batches(arrays: dict[str, np.ndarray], steps: int, size: int = 16) -> Iterator[dict[str, np.ndarray]]:
    draw, number = np.random.default_rng(0), len(arrays["where"])
    for _ in range(steps):
        index = draw.choice(number, size, replace=False)
        yield {name: x[index] for name, x in arrays.items()}
