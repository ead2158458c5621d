"""What is measured: the table of workloads, their inputs and targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from kdlosses.cache import largest_logits

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A loss on inputs of one size.

    Attributes:
        name: of the workload.
        loss: the function, in kdjax, kdtorch and benchmarks.direct.
        draw: makes the inputs by name, in the order of the function's arguments; floats in float32.
        learns: the inputs whose gradient is taken.
        torch: how many times faster than direct kdtorch shall be, eager.
        jax: the same of kdjax under jit.
        memory: the part of direct's memory that each may take.
        options: of the loss.
        direct: whether the direct form fits this machine.
    """

    name: str
    loss: str
    draw: Callable[[np.random.Generator], Inputs]
    learns: tuple[str, ...]
    torch: float | None = None
    jax: float | None = None
    memory: float | None = None
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    direct: bool = True

    def inputs(self) -> Inputs:
        return self.draw(np.random.default_rng(0))


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return scale * rng.standard_normal(shape, np.float32)


def _logits(
    *shape: int, labels: bool = False, names: tuple[str, str] = ("student", "teacher"), scale: float = 3.0
) -> Callable[[np.random.Generator], Inputs]:
    def draw(rng: np.random.Generator) -> Inputs:
        inputs: Inputs = {name: _normal(rng, *shape, scale=scale) for name in names}
        return {**inputs, "labels": rng.integers(shape[-1], size=shape[:-1])} if labels else inputs

    return draw


def _kept(*shape: int, top_k: int) -> Callable[[np.random.Generator], Inputs]:
    """A student's logits, and what is recorded of a teacher's: the largest, their classes, and the rest at T = 1."""

    def draw(rng: np.random.Generator) -> Inputs:
        student, teacher = _logits(*shape)(rng).values()
        found = largest_logits(teacher, top_k, [1.0])
        indices, rest = found["indices"].astype(np.int64), found["rest"][..., 0]
        return {"student": student, "values": found["values"], "indices": indices, "rest": rest}

    return draw


def _features(batch: int, dim: int, classes: int = 0) -> Callable[[np.random.Generator], Inputs]:
    def draw(rng: np.random.Generator) -> Inputs:
        inputs: Inputs = {name: _normal(rng, batch, dim) for name in ("student", "teacher")}
        if classes:
            inputs |= {"labels": rng.integers(classes, size=batch), "centers": _normal(rng, classes, dim)}
        return inputs

    return draw


def _views(batch: int, dim: int, views: int = 10, teacher_views: int = 2) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: {
        "student": _normal(rng, views, batch, dim),
        "teacher": _normal(rng, teacher_views, batch, dim),
        "state": {"center": _normal(rng, dim, scale=0.1)},
    }


def _crcd(batch: int, dim: int, negatives: int, rows: int) -> Callable[[np.random.Generator], Inputs]:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return lambda rng: {
        "student": _normal(rng, batch, dim),
        "teacher": _normal(rng, batch, dim),
        "index": rng.choice(rows, batch, replace=False),
        "negatives": rng.integers(rows, size=(batch, negatives)),
        "state": {
            "student_memory": unit(_normal(rng, rows, dim)),
            "teacher_memory": unit(_normal(rng, rows, dim)),
            "student_normalizer": np.float32(1e7),
            "teacher_normalizer": np.float32(1e7),
        },
    }


def _maps(batch: int, *shapes: tuple[int, int, int]) -> Callable[[np.random.Generator], Inputs]:
    """`[batch, channels, height, width]`"""
    return lambda rng: {name: [_normal(rng, batch, *shape) for shape in shapes] for name in ("student", "teacher")}


_S = ("student",)
_DIM = ("student", "centers")
_USKD = ("student", "weak")

WORKLOADS: tuple[Workload, ...] = (
    Workload("kl 128×10", "kl_loss", _logits(128, 10), _S, 1 / 2.5),
    Workload("kl 128×1000", "kl_loss", _logits(128, 1000), _S, 1.2, 1.3, 1.0, {"temperature": 4.0}),
    Workload("symmetric_kl 128×1000", "symmetric_kl_loss", _logits(128, 1000), _S, 1.4, 1.7, 1.0, {"temperature": 4.0}),
    Workload("dkd 128×1000", "dkd_loss", _logits(128, 1000, labels=True), _S, 1.8, 3.5, 0.7),
    Workload("nkd 128×1000", "nkd_loss", _logits(128, 1000, labels=True), _S, 2.3, 4.0, 0.75),
    Workload("uskd 128×1000", "uskd_loss", _logits(128, 1000, labels=True, names=_USKD), _USKD, 1.7, 1.0, 0.8),
    Workload("difference_kl 256×1000", "difference_kl_loss", _logits(256, 1000), _S, 110, 220, 1 / 90),
    Workload("difference_kl 256×1000 ±200", "difference_kl_loss", _logits(256, 1000, scale=70.0), _S, 4, 4, 1 / 35),
    Workload("euclidean_mse 1024×512", "euclidean_mse_loss", _features(1024, 512), _S, 1.4, 2.4, 1 / 3),
    Workload("dcn 1024×512, 1,000 classes", "dcn_loss", _features(1024, 512, 1000), _DIM, 25, 110),
    Workload("dcn 256×512, 50,000 classes", "dcn_loss", _features(256, 512, 50_000), _DIM, 240, 240),
    Workload("dino 2+8, 32×16,384", "dino_loss", _views(32, 16_384), _S, 2, 2, 1 / 2.2),
    Workload("dino 2+8, 32×32,768", "dino_loss", _views(32, 32_768), _S, 4, 4, 1 / 2.2),
    Workload("dino 2+8, 64×65,536", "dino_loss", _views(64, 65_536), _S, 2.5, 4, 1 / 2.2),
    Workload("crcd 64×128, K 500, 50,000 rows", "crcd_loss", _crcd(64, 128, 500, 50_000), ("student", "teacher"), 60, 60, 1 / 110),
    Workload("crcd 64×128, K 16,384, 50,000 rows", "crcd_loss", _crcd(64, 128, 16_384, 50_000), ("student", "teacher"), direct=False),
    Workload("hcl 128, three maps", "hcl_loss", _maps(128, (24, 48, 16), (64, 24, 8), (160, 12, 4)), _S, 1.5, 1.5, 0.6),
    Workload("kl 2×512×32,000", "kl_loss", _logits(2, 512, 32_000), _S, 1.2, 2.0, 0.7),
    Workload("topk_kl 2×512×32,000, k 64", "topk_kl_loss", _kept(2, 512, 32_000, top_k=64), _S),
)  # fmt: skip

# how each form grows: the axis, its values, and the workload at each of them
GROWTH: dict[str, tuple[str, dict[int, Workload]]] = {
    "difference_kl": ("batch", {b: Workload(f"growth: difference_kl {b}×1000", "difference_kl_loss", _logits(b, 1000), _S) for b in (16, 32, 64, 128, 256)}),
    "kl": ("classes", {c: Workload(f"growth: kl 128×{c}", "kl_loss", _logits(128, c), _S) for c in (100, 1000, 10_000, 100_000)}),
    "crcd": ("negatives", {k: Workload(f"growth: crcd 32×128, K {k}", "crcd_loss", _crcd(32, 128, k, 20_000), ("student", "teacher")) for k in (32, 128, 512, 2048)}),
}  # fmt: skip
