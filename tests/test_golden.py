"""The published codes' figures, in tests/golden, through both packages and the oracle."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch

import kdjax
import kdtorch
from parity.cases import LOSSES, Case
from parity.compare import difference
from parity.run import Result, run

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))
# relative to the value, and to the gradient's largest entry. The released code of the Euclidean distances clamps their
# squares at 1e-12, which is felt at 5e-13; everything else agrees to rounding.
LIMITS = {"float64": (1e-12, 1e-11), "float32": (3e-6, 1e-5)}


def load(path):
    with np.load(path) as data:
        return json.loads(bytes(data["meta"])), {key: data[key] for key in data.files if key != "meta"}


def published(path):
    """Each step of a file as a case, which starts from the state published for the step before, and what it gave."""
    meta, data = load(path)
    soft = data["in_labels"].ndim == 2 if "in_labels" in data else False
    loss = next(x for x in LOSSES if x.name == meta["function"] and ("distribution" in x.inputs.values()) == soft)
    for step in range(meta.get("steps", 1)):
        suffix = f"_{step}" if loss.state else ""
        if "maps" in meta:
            read = {key: [data[f"{key}_{i}"] for i in range(meta["maps"])] for key in MAPS}
            inputs = {"student_maps": read["in_student"], "teacher_maps": read["in_teacher"]}
            gradient = {"student_maps": read["grad_student"]}
        else:
            inputs = {key: data[f"in_{key}{suffix}"] for key in loss.inputs if key != loss.state}
            gradient = {key: data[f"grad_{RENAMED.get((loss.name, key), key)}{suffix}"] for key in loss.learns}
        states = []
        if loss.state:
            states = [{key: data[f"state_{key}_{step}"] for key in STATES[loss.name]}]
            inputs["state"] = {
                key: data[f"state_{key}_{step - 1}"] if step else data.get(f"in_{key}", np.zeros_like(now))
                for key, now in states[0].items()
            }
        options = dict(meta.get("kwargs", {}))
        if loss.name == "dino_loss":
            options = {key: meta[key] for key in ("student_temperature", "center_momentum")}
            options["teacher_temperature"] = meta["teacher_temperatures"][step]
        case = Case(loss, f"{meta['case']}{suffix}", (inputs,), options, seed=None)
        yield case, Result([data[f"out_loss{suffix}"]], [gradient], states)


MAPS = ("in_student", "in_teacher", "grad_student")
RENAMED = {("crcd_loss", "teacher"): "teacher_embedding"}
STATES = {
    "dino_loss": ("center",),
    "crcd_loss": ("student_memory", "teacher_memory", "student_normalizer", "teacher_normalizer"),
}
PUBLISHED = [step for path in FILES if "make_loss" not in path.stem for step in published(path)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("framework", ["jax", "torch", "oracle"])
@pytest.mark.parametrize(("case", "want"), PUBLISHED, ids=lambda x: x.name if isinstance(x, Case) else "")
def test_losses(case, want, framework, dtype):
    if framework == "oracle":  # its gradients, a step of every entry, are compared with the packages' on small cases
        want = Result(want.values, [{}], want.states)
    got = run(framework, case, dtype, gradients=framework != "oracle")
    for gradient in got.gradients:
        for key in case.loss.constant:
            gradient.pop(key)
    if framework == "oracle":  # which computes in more digits than either dtype has
        states = [{key: x.astype(dtype) for key, x in state.items()} for state in got.states]
        got = Result([x.astype(dtype) for x in got.values], got.gradients, states)
    for part, one, other in (
        ("value", got.values, want.values),
        ("gradient", got.gradients, want.gradients),
        ("state", got.states, want.states),
    ):
        limit = LIMITS[dtype][part != "value"] / np.finfo(dtype).eps
        names = {"subject": case.loss.title, "case": case.name, "dtype": dtype, "names": (framework, "published")}
        x = difference(one, other, limit=limit, expected=dtype, part=part, **names)
        assert x.passed, str(x)


@pytest.mark.parametrize("package", [kdjax, kdtorch])
@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("dino")], ids=lambda p: p.stem)
def test_teacher_temperature(path, package):
    meta, _ = load(path)
    schedule = {key: meta[key] for key in ("warmup", "final", "warmup_epochs")}
    for epoch, want in zip(meta["epochs"], meta["teacher_temperatures"], strict=True):
        assert float(package.dino_teacher_temperature(epoch, **schedule)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 3, 30])
def test_teacher_temperature_follows_the_released_table(warmup_epochs):
    """`np.linspace` and then the final temperature, of integers and of arrays, outside and inside a compiled program."""
    epochs, schedule = 33, {"warmup": 0.04, "final": 0.07, "warmup_epochs": warmup_epochs}
    table = np.concatenate([np.linspace(0.04, 0.07, warmup_epochs), np.full(epochs - warmup_epochs, 0.07)])
    ours = jax.jit(lambda epoch: kdjax.dino_teacher_temperature(epoch, **schedule))
    theirs = torch.compile(
        lambda epoch: kdtorch.dino_teacher_temperature(epoch, **schedule), backend="eager", fullgraph=True
    )
    for epoch in (0, 1, 2, 29, 32):
        for got in (
            kdjax.dino_teacher_temperature(epoch, **schedule),
            kdtorch.dino_teacher_temperature(epoch, **schedule),
            ours(epoch),
        ):
            assert float(got) == pytest.approx(table[epoch], rel=1e-12)
    every = np.arange(epochs)
    for got in (ours(every), kdjax.dino_teacher_temperature(every, **schedule)):
        np.testing.assert_allclose(got, table, rtol=1e-12)
    for function in (theirs, lambda epoch: kdtorch.dino_teacher_temperature(epoch, **schedule)):
        np.testing.assert_allclose(function(torch.from_numpy(every)), table, rtol=1e-12)
