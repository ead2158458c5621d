"""Shared by the recipes of a served teacher: the engine, on lines of text that ship with Python.

The teacher knows how often each byte follows two others. `serve` returns what vLLM returns for a prompt:

    LLM(model, max_logprobs=16).generate(prompts, SamplingParams(prompt_logprobs=16, max_tokens=1))[i].prompt_logprobs

This is None for the first token, and for each other one a dict with the 16 likeliest tokens in its place and the token
itself, which makes 17 entries if it is not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from _text import BYTES, LENGTH, LINES

KEPT, BATCH = 16, 64
LEARNED, HELD_OUT = LINES[:800], LINES[800:900]


class Logprob(NamedTuple):
    logprob: float
    rank: int


def _counts() -> np.ndarray:
    counts = np.full((BYTES, BYTES, BYTES), 0.02)
    for line in LINES:
        text = np.frombuffer(line, np.uint8)
        np.add.at(counts, (text[:-2], text[1:-1], text[2:]), 1)
    return np.log(counts / counts.sum(-1, keepdims=True))


_TEACHER = _counts()


def teacher(text: bytes) -> np.ndarray:
    """The log-probabilities of the byte after each byte except the last, `[length - 1, 128]`."""
    tokens = np.frombuffer(text, np.uint8)[:-1]
    return _TEACHER[np.concatenate([[0], tokens[:-1]]), tokens]


def serve(text: bytes) -> list[dict[int, Logprob] | None]:
    answer: list[dict[int, Logprob] | None] = [None]
    for row, token in zip(teacher(text), text[1:], strict=True):
        likeliest = np.argsort(-row)[:KEPT].tolist()
        entries = {x: Logprob(float(row[x]), rank) for rank, x in enumerate(likeliest, 1)}
        answer.append({token: Logprob(float(row[token]), 1 + int((row > row[token]).sum()))} | entries)
    return answer


def arrays(prompt_logprobs: list[dict[int, Logprob] | None]) -> tuple[np.ndarray, np.ndarray]:
    """`[length - 1, 16]`: log-probabilities and tokens, the likeliest first, without the 17th that some places have."""
    top = [
        sorted(((x.logprob, token) for token, x in row.items()), reverse=True)[:KEPT] for row in prompt_logprobs if row
    ]
    both = np.array(top, np.float64).reshape(-1, KEPT, 2)
    return both[..., 0], both[..., 1].astype(np.int64)


def batches(rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    """Batches for `record_teacher`, of every `ranks`-th line: padded, with the number of tokens of each line."""
    lines = range(rank, len(LEARNED), ranks)
    for start in range(0, len(lines), BATCH):
        index = np.array(lines[start : start + BATCH])
        answers = [arrays(serve(LEARNED[i])) for i in index]
        lengths = np.array([len(x) for x, _ in answers])
        log_probs = np.zeros((len(index), lengths.max(), KEPT))
        indices = np.zeros(log_probs.shape, np.int64)
        for row, (values, tokens) in enumerate(answers):
            log_probs[row, : lengths[row]], indices[row, : lengths[row]] = values, tokens
        yield {"index": index, "log_probs": log_probs, "indices": indices, "lengths": lengths}


def tokens(lines: list[bytes], index: np.ndarray) -> np.ndarray:
    """`[batch, 39]`: lines without their last byte, padded with 0."""
    padded = np.zeros((len(index), LENGTH - 1), np.int64)
    for row, i in zip(padded, index, strict=True):
        row[: len(lines[i]) - 1] = np.frombuffer(lines[i], np.uint8)[:-1]
    return padded
