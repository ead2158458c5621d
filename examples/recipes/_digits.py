"""Shared by the recipes: scikit-learn's handwritten digits as arrays, and a teacher trained on them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # digits.py and its two halves
import digits

SETTING = digits.Setting(teacher=((8, 16), 64), steps=150)
DATA = digits.load_data(SETTING)
LABELS = DATA.labels.astype(np.int64)


def train() -> tuple[np.ndarray, np.ndarray]:
    """1,000 images `[1000, 8, 8]` between 0 and 1, and their labels."""
    return DATA.views[0, DATA.train], LABELS[DATA.train]


def test() -> tuple[np.ndarray, np.ndarray]:
    """500 images that are not used for training, and their labels."""
    return DATA.views[0, DATA.test], LABELS[DATA.test]


def batches(steps: int, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random images and labels of the training set, for each step."""
    draw, (images, labels) = np.random.default_rng(0), train()
    for _ in range(steps):
        index = draw.choice(len(labels), size, replace=False)
        yield images[index], labels[index]


def told() -> tuple[np.ndarray, np.ndarray]:
    """Two images per class of the training set, for a student with few labels."""
    images, labels = train()
    first = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(10)])
    return images[first], labels[first]


def views(steps: int, seed: int, size: int = 64) -> Iterator[np.ndarray]:
    """`[2, size, 8, 8]`: images of the training set, each shifted and blurred by noise in two ways."""
    draw, shifted = np.random.default_rng(seed), DATA.views[:, DATA.train]
    for _ in range(steps):
        both = shifted[draw.integers(0, len(shifted), (2, size)), draw.integers(0, shifted.shape[1], size)]
        yield both + draw.normal(0, 0.1, both.shape).astype(np.float32)


@cache
def teacher(framework: str) -> Any:
    """A small trained CNN in `"jax"` or `"torch"`, from images to its `logits`, `embedding` and `maps`."""
    half = importlib.import_module(f"_digits_{framework}")
    plan = digits.make_plan(DATA, SETTING._replace(labelled=0), seed=0)
    return half.make_teacher({"views": DATA.views[:, DATA.train], "labels": DATA.labels[DATA.train]}, plan, SETTING)
