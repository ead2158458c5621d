"""Shared by both scripts: the options, the teacher, each rank's part of the batches, and the output of the losses."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # digits.py and its two halves, which the scripts import next
from digits import Data, Parser, Plan, Setting, Teacher, at_least_one, load_data, make_plan, training_set

# with a larger rate, the rounding of float32 may grow beyond 1e-6 in 50 steps
SETTING = Setting(steps=50, student_rate=0.001)


def options_of(script: str, description: str) -> Parser:
    """A parser with the options of both scripts."""
    parser = Parser(prog=script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--steps", type=at_least_one, default=SETTING.steps, help="steps of each training (50)")
    parser.add_argument("--accumulate", type=at_least_one, default=1, help="micro-batches per step (1)")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="each rank writes its losses to RANK.json there")
    return parser


def load_inputs(parser: Parser, options: argparse.Namespace, rank: int, ranks: int) -> tuple[dict[str, Any], Plan]:
    """The training set, and this rank's examples of every micro-batch, by step and micro-batch."""
    if SETTING.batch % (options.accumulate * ranks):
        parser.error(
            f"--accumulate: a batch of {SETTING.batch} must split evenly into {options.accumulate} micro-batches on "
            f"{ranks} ranks"
        )
    data = load_data(SETTING)

    def part(x: np.ndarray, axis: int) -> np.ndarray:
        micro_batches = np.stack(np.split(x, options.accumulate, axis), 1)
        return np.split(micro_batches, ranks, axis + 1)[rank]

    plan = make_plan(data, SETTING._replace(steps=options.steps), seed=1)
    plan = Plan(part(plan.index, 1), part(plan.shifts, 2), part(plan.negatives, 1))
    return training_set(data, SETTING, make_teacher(data)), plan


def make_teacher(data: Data) -> Teacher:
    """Random features with a linear head fitted to the labels: needs no training, and is the same in every process."""
    pixels = data.views[:, data.train].reshape(len(data.views), len(data.train), -1)
    weights = np.random.default_rng(0).normal(size=(pixels.shape[-1], SETTING.teacher[1]))
    features = np.tanh(pixels @ weights)
    head, *_ = np.linalg.lstsq(features[0], 10 * np.eye(SETTING.classes)[data.labels[data.train]])
    embedding = (features[0] - features[0].mean(0)) / features[0].std(0)
    return Teacher(features[0] @ head, embedding, views=features @ head)


def tell(losses: dict[str, list[float]], rank: int, ranks: int, folder: Path | None) -> None:
    """Print and write this rank's losses of the whole batches."""
    for dtype, curve in losses.items():
        print(f"rank {rank} of {ranks}, {dtype}: {curve[0]:.12g} -> {curve[-1]:.12g} in {len(curve)} steps", flush=True)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{rank}.json").write_text(json.dumps(losses) + "\n")
