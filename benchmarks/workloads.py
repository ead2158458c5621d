"""The workloads that are measured: the benchmarks in the rows of `parity.losses`, and their inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from parity.arrays import each_array
from parity.kinds import KINDS
from parity.losses import LOSSES
from parity.row import Benchmark, Growth, Loss


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss on inputs of one size."""

    loss: Loss
    benchmark: Benchmark

    @property
    def name(self) -> str:
        return f"{self.loss.name.removesuffix('_loss')} {self.benchmark.title}"

    def inputs(self) -> dict[str, Any]:
        """The inputs by name, in the order of the arguments, in float32; a state is as after some steps.

        A benchmark in half precision converts them itself, because NumPy does not have its dtype.
        """
        rng = np.random.default_rng(0)
        inputs = {name: KINDS[kind].draw(rng, self.benchmark.sizes) for name, kind in self.loss.inputs.items()}
        for name, kind in self.loss.inputs.items():
            if kind == "logits":
                inputs[name] *= self.benchmark.factor
            if name == self.loss.state:
                inputs[name] |= KINDS[kind].later
        return each_array(inputs, lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x)

    @property
    def where(self) -> np.ndarray | None:
        """A mask that keeps four of five examples, if the benchmark is masked."""
        batch = self.benchmark.sizes.batch
        return np.arange(math.prod(batch)).reshape(batch) % 5 > 0 if self.benchmark.masked else None


WORKLOADS: tuple[Workload, ...] = tuple(Workload(loss, x) for loss in LOSSES for x in loss.benchmarks)


def _growing(loss: Loss, growth: Growth) -> dict[int, Workload]:
    def sizes(value: int) -> dict[str, Any]:
        return {growth.axis: (value,) if growth.axis == "batch" else value}

    return {
        value: Workload(
            loss,
            Benchmark(f"growth: {growth.axis} {value}", dataclasses.replace(growth.sizes, **sizes(value))),
        )
        for value in growth.values
    }


# the workloads that show how time and memory grow: for each loss the axis that grows, and the workload for each size
GROWTH: dict[str, tuple[str, dict[int, Workload]]] = {
    loss.name.removesuffix("_loss"): (loss.growth.axis, _growing(loss, loss.growth)) for loss in LOSSES if loss.growth
}
