"""Edge cases of CRD, compared with the formula in extended precision."""

import dataclasses

import numpy as np
import pytest
from frameworks import BOTH, TORCH
from tiers import only

from parity.cases import LOSSES, Case, Sizes, cases, draw
from parity.check import check
from parity.compare import Comparison
from parity.run import run

CRD = next(x for x in LOSSES if x.name == "crd_loss")
each = pytest.mark.parametrize("f", only(lambda f: f is TORCH, BOTH), ids=lambda f: f.name)


def agrees(f, case, dtype):
    comparison = Comparison(tuple(check(case, dtype, [f.name])))
    assert comparison.passed, f"\n{comparison}"


def near(dtype="float32"):
    """Inputs whose embeddings differ from the memory by a thousandth, so that v.w is nearly 1."""
    (inputs,) = draw(CRD, Sizes(), 0)
    rng = np.random.default_rng(0)
    for side, other in (("student", "teacher"), ("teacher", "student")):
        memory = inputs[side] / np.linalg.norm(inputs[side], axis=1, keepdims=True)
        noise = 1e-3 * rng.normal(size=memory.shape)
        inputs["state"][f"{other}_memory"][inputs["index"]] = (memory + noise).astype(np.float32)
    return inputs


@each
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_negatives_that_contain_the_positive(f, dtype):
    ordinary = next(cases(CRD))
    (inputs,) = draw(CRD, Sizes(), 0)
    inputs["negatives"][:, 1] = inputs["index"]
    inputs["negatives"][0, 3] = inputs["index"][0]  # the example's own index is also a negative
    agrees(f, dataclasses.replace(ordinary, steps=(inputs,)), dtype)


@each
def test_a_temperature_whose_normaliser_float32_does_not_hold(f):
    """exp(1 / 0.005) overflows in float32: the value is right, and the normaliser stays unset; float64 sets it."""
    case = Case(CRD, "cold", (near(),), {"temperature": float(np.float32(0.005))}, reduction="none")
    want = run("oracle", case, "float32", gradients=False)
    got = run(f.name, case, "float32")
    assert (
        np.abs(got.values[0] - want.values[0]).max() <= 200 * 8 * np.finfo("float32").eps * np.abs(want.values[0]).max()
    )
    assert all(np.isfinite(x).all() for x in got.gradients[0].values())
    assert got.states[0]["student_normalizer"] == got.states[0]["teacher_normalizer"] == 0
    held = run(f.name, case, "float64").states[0]["student_normalizer"]
    assert held == pytest.approx(float(want.states[0]["student_normalizer"]), rel=1e-12)


@each
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_mixture_of_zero_leaves_its_row(f, momentum):
    """For an embedding of zeros at momentum 0, and for an embedding opposite to the unit row at momentum ½."""
    (inputs,) = draw(CRD, Sizes(), 0)
    place, others = inputs["index"][0], inputs["index"][1:]
    memory, unit = inputs["state"]["student_memory"], np.eye(6)[2]
    memory[place] = unit
    inputs["student"][0] = -unit if momentum else 0
    result = run(f.name, Case(CRD, "zero", (inputs,), {"momentum": momentum}))
    assert np.isfinite(result.values[0])
    assert np.isfinite(result.gradients[0]["student"]).all()
    after = result.states[0]["student_memory"]
    assert np.array_equal(after[place], unit)
    assert (after[others] != memory[others]).any(1).all()
    if not momentum:
        assert (result.gradients[0]["student"][0] == 0).all()


@each
def test_a_normaliser_is_set_once(f):
    """By the kept examples of the first step; a later batch or temperature, or a fully masked batch, does not change
    it."""
    steps = draw(CRD, Sizes(), 0, steps=3)
    case = Case(CRD, "", steps)
    states = run(f.name, case).states
    for field in ("student_normalizer", "teacher_normalizer"):
        assert states[0][field] > 0
        assert states[0][field] == states[1][field] == states[2][field]
    nothing = run(f.name, dataclasses.replace(case, where=np.zeros(5, bool))).states
    assert all(state["student_normalizer"] == 0 for state in nothing)
