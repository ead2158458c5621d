"""All properties in `laws.py` on 10 random examples of each loss, in JAX only for one loss of each kind.

`make test-all` tests 100 examples of each loss, in JAX 20, and `make fuzz` 20,000.
"""

import hypothesis
import laws
import pytest
from tiers import REPRESENTATIVES, only

from parity.cases import LOSSES


def test_a_row_names_laws_that_there_are():
    assert {name for loss in LOSSES for name in loss.laws} <= {law.__name__ for law in laws.LAWS}


CASES = [(name, loss) for name in laws.PACKAGES for loss in LOSSES]
FEW = [(10, name, loss) for name, loss in CASES if name == "torch" or loss.name in REPRESENTATIVES]


@pytest.mark.parametrize(
    ("draws", "name", "loss"),
    only(lambda x: x[0] == 10, FEW + [(100, name, loss) for name, loss in CASES]),
    ids=lambda x: getattr(x, "title", str(x)),
)
def test_laws(draws, name, loss):
    trials = [laws.Trial(name, loss, recipe) for recipe in laws.KEPT]
    for trial in trials:
        laws.obey(trial)

    @hypothesis.settings(max_examples=draws if name == "torch" else min(draws, 20))
    @hypothesis.given(laws.RECIPES)
    def each(recipe):
        trials.append(laws.Trial(name, loss, recipe))
        laws.obey(trials[-1])

    each()
    if name == "torch" or draws > 10:  # JAX compiles a program for each of these properties
        laws.obey_together(name, loss, trials)
