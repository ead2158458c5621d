"""All properties in `laws.py` on 10 random examples of each loss, in JAX only for one loss of each kind.

`make test-all` tests 100 examples of each loss, in JAX 20, and `make fuzz` 20,000.
"""

import hypothesis
import laws
import pytest
from tiers import REPRESENTATIVES, first, only

from parity.cases import LOSSES


def test_a_row_names_laws_that_there_are():
    assert {name for loss in LOSSES for name in loss.laws} <= {law.__name__ for law in laws.LAWS}


CASES = [(name, loss) for name in laws.PACKAGES for loss in LOSSES]


@pytest.mark.parametrize(
    ("name", "loss"),
    only(lambda x: x[0] == "torch" or x[1].name in REPRESENTATIVES, CASES),
    ids=lambda x: x if isinstance(x, str) else x.title,
)
@pytest.mark.parametrize("draws", first(1, [10, 100]))
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
