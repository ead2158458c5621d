"""A thousand steps of every loss with state; `make fuzz` takes ten thousand."""

import long_run
import pytest

pytestmark = pytest.mark.slow  # thousands of steps


@pytest.mark.parametrize("loss", long_run.STATEFUL, ids=lambda loss: loss.title)
def test_a_thousand_steps(loss):
    """No drift between the packages, no state that a bad batch poisons, no growth of memory."""
    figures = long_run.check(loss, 1000)
    assert figures["state"] <= 64
    assert figures["value"] <= 4096  # of logits that a temperature of 0.04 multiplies by 25
    assert figures["growth in JAX"] < 8
    assert figures["growth in PyTorch"] < 8
