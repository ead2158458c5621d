"""kdjax, kdtorch and the oracle agree on all cases of the table: values, gradients and states, in every precision."""

import dataclasses
import sys

import pytest
from tiers import OTHER_SHAPES, REPRESENTATIVES, first, slow

from parity.cases import LOSSES, PERTURBATIONS, cases, random_case
from parity.check import DTYPES, check
from parity.compare import Comparison, difference
from parity.run import run

CASES = [case for loss in LOSSES for case in cases(loss)]
# half precision is only a cast of inputs and outputs, so the cases that share one compiled program are enough
ONE_PROGRAM = ("ordinary", *PERTURBATIONS)


def is_run(case, dtype):
    return case.name in ONE_PROGRAM or dtype == "float64" or (dtype == "float32" and case.name not in OTHER_SHAPES)


def tier(case, dtype):
    """The tier of a case. In the first: in float64 the cases that share a program, in float32 one loss of each kind."""
    ordinary = dtype == "float32" and case.name == "ordinary" and case.loss.name in REPRESENTATIVES
    quick = ordinary or (dtype == "float64" and case.name in ONE_PROGRAM)
    return pytest.param(case, dtype, marks=() if quick else slow)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [tier(case, dtype) for case in CASES for dtype in DTYPES if is_run(case, dtype)],
    ids=str,
)
def test_both_packages_agree_with_the_oracle(case, dtype):
    comparison = Comparison(tuple(check(case, dtype)))
    assert comparison.passed, f"\n{comparison}"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
@pytest.mark.parametrize("names", first(1, [["ordinary"], list(OTHER_SHAPES)]), ids=["ordinary", "other shapes"])
def test_torch_in_float32(names, loss):
    """PyTorch need not compile a program for each shape, so it runs the cases that JAX runs in float64 alone."""
    for case in (x for x in cases(loss) if x.name in names):
        comparison = Comparison(tuple(check(case, "float32", ["torch"])))
        assert comparison.passed, f"\n{comparison}"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
@pytest.mark.parametrize("seeds", first(1, [range(2), range(2, 10)]), ids=["few", "many"])
def test_random_draws(seeds, loss):
    """Only in PyTorch, which does not compile; `python -m parity --tries` tests both."""
    for seed in seeds:
        comparison = Comparison(tuple(check(random_case(loss, seed), "float64", ["torch"])))
        assert comparison.passed, f"\n{comparison}"


@slow
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
@pytest.mark.parametrize(("size", "every"), [(8, True), (10, False)])
def test_in_blocks(size, every, loss, monkeypatch):
    """PyTorch on a CPU computes large batches in blocks, in this test of one row, or of two rows with one left over."""
    modules = [x for name, x in sys.modules.items() if name.startswith("kdtorch") and hasattr(x, "BLOCK")]
    for module in modules:
        monkeypatch.setattr(module, "BLOCK", size)
    for case in (x for x in cases(loss) if every or x.name in ONE_PROGRAM):
        comparison = Comparison(tuple(check(case, "float64", ["torch"])))
        assert comparison.passed, f"\n{comparison}"


@slow
def test_a_step_of_every_entry_gives_what_a_step_of_all_examples_gives():
    """The oracle steps all examples at once if their values do not depend on each other."""
    for loss in (x for x in LOSSES if not x.batch_coupled):
        case = next(cases(loss))
        alone = dataclasses.replace(case, loss=dataclasses.replace(loss, batch_coupled=True))
        one, other = (run("oracle", x).gradients for x in (case, alone))
        found = difference(
            one, other, limit=1, subject=loss.title, case="", dtype="float64", part="gradient", names=("all", "one")
        )
        assert found.passed, str(found)
