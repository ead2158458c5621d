"""kdjax = kdtorch = oracle, over the one table of cases: values, gradients, states."""

import pytest

from parity.cases import LOSSES, cases
from parity.compare import assert_close
from parity.run import run

CASES = [case for loss in LOSSES for case in cases(loss)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_packages_agree_with_the_oracle(case, dtype):
    want = run("oracle", case, dtype)
    for framework in ("jax", "torch"):
        assert_close(run(framework, case, dtype), want, dtype, case.scale)
