"""Edge cases of MiniLM."""

import numpy as np
import pytest
from frameworks import BOTH, TORCH
from tiers import only

from parity.cases import LOSSES, Case, Sizes, draw
from parity.run import run

MINILM = next(x for x in LOSSES if x.name == "minilm_loss")
each = pytest.mark.parametrize("f", only(lambda f: f is TORCH, BOTH), ids=lambda f: f.name)


def given(sizes=None):
    (inputs,) = draw(MINILM, sizes or Sizes(), 0)
    return inputs


@each
def test_masked_tokens_are_as_if_they_were_not_there(f):
    """Also in the middle, and even if they hold NaN; the mean is over sequences of any length."""
    inputs, where = given(Sizes((3,), positions=5)), np.array([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    spoilt = {k: np.where(where[..., None], x, np.nan) for k, x in inputs.items()}
    whole = run(f.name, Case(MINILM, "", (spoilt,), where=where, reduction="none", seed=None))
    assert whole.values[0][2] == 0
    alone = []
    for i in range(2):
        short = {k: x[i : i + 1, where[i]] for k, x in inputs.items()}
        part = run(f.name, Case(MINILM, "", (short,), reduction="none", seed=None))
        assert whole.values[0][i] == pytest.approx(part.values[0][0], rel=1e-13)
        gradient = whole.gradients[0]["student"][i]
        np.testing.assert_allclose(gradient[where[i]], part.gradients[0]["student"][0], rtol=1e-11, atol=1e-14)
        assert (gradient[~where[i]] == 0).all()
        alone.append(part.values[0][0])
    assert (whole.gradients[0]["student"][2] == 0).all()
    mean = run(f.name, Case(MINILM, "", (spoilt,), where=where), gradients=False)
    assert mean.values[0] == pytest.approx(np.mean(alone), rel=1e-13)


@each
def test_one_kept_token(f):
    inputs, where = given(), np.arange(4) == np.array([[0], [3], [1], [2], [2]])
    result = run(f.name, Case(MINILM, "", (inputs,), where=where, reduction="none"), "float32")
    assert (result.values[0] == 0).all()
    assert (result.gradients[0]["student"] == 0).all()


@each
def test_numbers_whose_products_float32_does_not_hold(f):
    """Rows that attend to only one token, which is the same in student and teacher, or another one."""
    student, teacher = 1e25 * np.eye(4)[None], 1e30 * np.eye(4)[None]
    one = np.concatenate([teacher[:, :1], 2 * teacher[:, :1], teacher[:, 2:]], 1)  # the first attends to the second
    values = []
    for x in (teacher, one):
        result = run(f.name, Case(MINILM, "", ({"student": student, "teacher": x},), reduction="none"), "float32")
        assert np.isfinite(result.gradients[0]["student"]).all()
        values.append(result.values[0][0])
    assert values[0] == 0
    assert values[1] > 1e37  # it overflows, or nearly
