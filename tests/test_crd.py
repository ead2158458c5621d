"""CRD where its formula is at an edge: kept cases, against the formula in extended precision."""

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
    """Every embedding is what is remembered of it, but for a thousandth, so that v.w is 1."""
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
    inputs["negatives"][:, 1] = inputs["negatives"][0, 3] = inputs["index"][:]
    agrees(f, dataclasses.replace(ordinary, steps=(inputs,)), dtype)


@each
def test_a_temperature_whose_normaliser_float32_does_not_hold(f):
    """Of exp(1 / 0.005). The value is that of the formula, and the normaliser stays unset; float64 holds it."""
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
def test_a_mixture_of_zero_leaves_its_row(f):
    """An embedding of zeros at momentum 0, and one that is the opposite of its row at momentum ½."""
    (inputs,) = draw(CRD, Sizes(), 0)
    place = inputs["index"][0]
    for momentum, row in ((0.0, np.zeros(6)), (0.5, -inputs["state"]["student_memory"][place])):
        given = {**inputs, "student": inputs["student"].copy(), "state": dict(inputs["state"])}
        given["student"][0] = row
        memory = given["state"]["student_memory"] = inputs["state"]["student_memory"].copy()
        memory[place] = (row := np.eye(6)[2] * np.sign(momentum)) if momentum else memory[place]
        given["student"][0] = -row
        result = run(f.name, Case(CRD, "zero", (given,), {"momentum": momentum}), "float64")
        assert np.isfinite(result.values[0])
        after = result.states[0]["student_memory"]
        assert np.array_equal(after[place], memory[place])
        assert (after[inputs["index"][1:]] != memory[inputs["index"][1:]]).any(1).all()


@each
def test_a_normaliser_is_set_once(f):
    """By the kept examples of the first step; another batch, another temperature, or no kept example do not move it."""
    steps = draw(CRD, Sizes(), 0, steps=3)
    case = Case(CRD, "", steps)
    states = run(f.name, case).states
    for field in ("student_normalizer", "teacher_normalizer"):
        assert states[0][field] > 0
        assert states[0][field] == states[1][field] == states[2][field]
    nothing = run(f.name, dataclasses.replace(case, where=np.zeros(5, bool))).states
    assert all(state["student_normalizer"] == 0 for state in nothing)
