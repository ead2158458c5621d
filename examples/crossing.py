"""A PyTorch teacher for a Flax student and a Flax teacher for a PyTorch student, compared with the same framework.

The data, the networks and the students are those of `digits.py`. A teacher is called from the framework of its student,
and its logits and embeddings are recorded on disk. The student, which has 50 labels, reads them and learns with
`kl_loss` and `mse_loss`. The table shows the accuracy of the students on the 500 test images.

    python examples/crossing.py
    python examples/crossing.py --quick
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _digits_jax
import _digits_torch
import digits
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kdjax.interop import torch_teacher
from kdjax.teacher_cache import record_teacher as record_in_jax
from kdtorch.interop import jax_teacher
from kdtorch.teacher_cache import record_teacher as record_in_torch

HALVES = {"jax": _digits_jax, "torch": _digits_torch}
LOSSES = "kl+mse"


def outputs(net: Any, teacher: str, student: str, images: np.ndarray) -> Iterator[dict[str, Any]]:
    """Batches of the teacher's outputs, as arrays of the student's framework."""
    if student == "jax":
        say = torch_teacher(net) if teacher == "torch" else net
    else:
        say = jax_teacher(net) if teacher == "jax" else torch.no_grad()(net)
    array = jnp.asarray if student == "jax" else torch.from_numpy
    for index in np.array_split(np.arange(len(images)), 8):
        said = say(array(images[index]))
        yield {"index": index, "logits": said.logits, "embedding": said.embedding}


def train(teacher: str, student: str, net: Any, data: digits.Data, setting: digits.Setting, seeds: int) -> np.ndarray:
    """The test accuracies of students of one framework, taught by a teacher of one framework through a cache on disk."""
    record = {"jax": record_in_jax, "torch": record_in_torch}[student]
    with tempfile.TemporaryDirectory() as folder:
        batches = outputs(net, teacher, student, data.views[0, data.train])
        cache = record(Path(folder) / "teacher", batches, dtype="float32")
        said = {name: np.asarray(x) for name, x in cache.read(np.arange(len(data.train))).items()}
    embedding = said["embedding"]
    taught = digits.Teacher(said["logits"], (embedding - embedding.mean(0)) / embedding.std(0))
    plans = [digits.make_plan(data, setting, 1 + seed) for seed in range(seeds)]
    runs = HALVES[student].train_students(
        digits.mixture(LOSSES), digits.training_set(data, setting, taught), plans, setting, data.views[0]
    )
    return np.array([digits.accuracies(run["logits"], data)["test_accuracy"] for run in runs])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds with 100 steps instead of five with 300")
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder for crossing.json")
    options = parser.parse_args(arguments)
    setting, seeds = digits.Setting(steps=100 if options.quick else 300), 2 if options.quick else 5
    data = digits.load_data(setting)

    table = Table(title="test accuracy in %, mean ± standard deviation over seeds")
    for column in ("teacher", "student", "test accuracy"):
        table.add_column(column)
    results = []
    for teacher, half in HALVES.items():
        plan = digits.make_plan(data, setting._replace(labelled=0), seed=0)
        images = {"views": data.views[:, data.train], "labels": data.labels[data.train]}
        net = half.make_teacher(images, plan, setting)
        for student in HALVES:
            accuracy = train(teacher, student, net, data, setting, seeds)
            results.append({"teacher": teacher, "student": student, "test_accuracies": accuracy.tolist()})
            table.add_row(teacher, student, f"{100 * accuracy.mean():.1f} ± {100 * accuracy.std(ddof=1):.1f}")
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "crossing.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
