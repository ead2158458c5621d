"""A thousand steps of all losses with a state; `make fuzz` takes ten thousand."""

import long_run
import pytest

pytestmark = pytest.mark.slow  # thousands of steps


@pytest.mark.parametrize("loss", long_run.STATEFUL, ids=lambda loss: loss.title)
def test_a_thousand_steps(loss):
    """The packages do not drift apart, a bad batch does not corrupt a state, and memory does not grow."""
    figures = long_run.check(loss, 1000)
    assert figures["state"] <= 64
    assert figures["value"] <= 4096  # a temperature of 0.04 multiplies logits by 25
    assert figures["growth in JAX"] < 8
    assert figures["growth in PyTorch"] < 8
