"""Difficult cases for losses over pairs of samples: rows far from the origin, opposite rows, zeros, ties, and few
rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import JAX
from tiers import first, slow

import kdjax
import kdtorch
from parity.cases import LOSSES, Case
from parity.check import check

NAMES = ("similarity_loss", "pkt_loss", "correlation_loss", "instance_graph_loss", "rkd_loss")
ROWS = {loss.name: loss for loss in LOSSES if loss.name in NAMES}
framework = pytest.mark.parametrize("framework", first(1, ["torch", "jax"]))


def drawn(seed=0, batch=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, 5)), rng.normal(size=(batch, 3))


def _far(s, t):
    """Rows that are close to each other and far from the origin; float32 products of such rows lose all distances."""
    return s + 1e4, t - 1e4


def _opposite(s, t):
    """Two rows whose sum is 0, or nearly 0, in the student, the teacher or both."""
    s[1], s[3], t[3], t[5] = -s[0], -2 * s[2] + 1e-3, -t[2], -t[4] + 1e-4
    return s, t


def _zero(s, t):
    s[0], s[1], t[1], t[2] = 0, 0, 0, 0
    return s, t


def _tied(s, t):
    """The corners of a square, where two pairs are farthest apart; the first one is used."""
    corners = np.zeros_like(s)
    corners[1:5, :2] = [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    return corners + np.arange(5), t


CASES = {
    "far": _far,
    "opposite": _opposite,
    "zero": _zero,
    "tied": _tied,
    "all-equal": lambda s, t: (np.broadcast_to(s[:1], s.shape), t),
    "all-zero": lambda s, t: (0 * s, t),
    "two": lambda s, t: (s[:2], t[:2]),
    "two-equal": lambda s, t: (s[[0, 0]], t[:2]),
    "one": lambda s, t: (s[:1], t[:1]),
}
ANGULAR = (
    "similarity_loss",
    "pkt_loss",
    "correlation_loss",
)  # for these, rows far from the origin coincide up to rounding


@framework
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in NAMES for case in CASES if case != "far" or name not in ANGULAR]
)
def test_the_formula(framework, dtype, name, case):
    """Value and gradient agree with the formula within the usual limits; if all rows are equal, both may be 0."""
    inputs = dict(zip(("student", "teacher"), CASES[case](*drawn()), strict=True))
    inputs = {key: x.astype(np.float32).astype(np.float64) for key, x in inputs.items()}
    loss = ROWS[name]
    where = np.arange(len(inputs["student"])) != 5 if case == "tied" else None
    given = Case(loss, case, (inputs,), loss.options[0], where, scale=0.1, value_scale=loss.scale)
    for difference in check(given, dtype, (framework,)):
        assert difference.passed, difference


@framework
@pytest.mark.parametrize("name", ["similarity_loss", "correlation_loss", "instance_graph_loss", "rkd_loss"])
@pytest.mark.parametrize("factor", [1e-7, 1e-30, 1e30])
def test_no_scale_of_the_features_is_felt(framework, name, factor):
    """In float32, where released code of similarity gives 0.45 instead of 0 at 1e-7. Longer rows have smaller
    gradients."""
    student, teacher = (x.astype(np.float32) for x in drawn())
    factor = 2.0 ** round(np.log2(factor))
    plain, scaled = (value_and_slope(framework, name, x, teacher) for x in (student, np.float32(factor) * student))
    assert scaled[0] == pytest.approx(plain[0], rel=1e-6)
    assert scaled[1] * factor == pytest.approx(plain[1], rel=1e-5, abs=1e-6 * float(np.abs(plain[1]).max()))


def value_and_slope(framework, name, student, teacher):
    if framework == "jax":
        function = jax.jit(jax.value_and_grad(getattr(kdjax, name)))
        with jax.enable_x64(False):
            return tuple(map(JAX.numpy, function(jnp.asarray(student), jnp.asarray(teacher))))
    x = torch.from_numpy(student).requires_grad_()
    value = getattr(kdtorch, name)(x, torch.from_numpy(teacher))
    return value.item(), torch.autograd.grad(value, x)[0].double().numpy()


def test_the_first_of_tied_pairs_has_the_gradient():
    """With rows at 0, 2, 0 and 2, the first two rows get the gradient of the largest distance."""
    student = torch.tensor([[0.0], [2.0], [0.0], [2.0], [1.0]], requires_grad=True)
    teacher = torch.tensor([[0.0], [2.0], [0.3], [1.5], [1.0]])
    value = kdtorch.instance_graph_loss(student, teacher)
    (got,) = torch.autograd.grad(value, student)

    square = (student - student.T).square()
    edges = (teacher - teacher.T).square() / 4
    want = torch.autograd.grad((square / square[0, 1] - edges).square().mean(), student)[0]
    torch.testing.assert_close(got, want)


@framework
def test_an_order_that_is_no_number_is_an_error(framework):
    loss = (kdjax if framework == "jax" else kdtorch).correlation_loss
    rows = (jnp if framework == "jax" else torch).ones((2, 3))
    for order in (0, 1.5, -1):
        with pytest.raises((ValueError, TypeError), match="order"):
            loss(rows, rows, order=order)


@slow
def test_another_number_of_rows_at_once_changes_nothing(monkeypatch):
    """kdtorch computes a large batch in blocks; in rkd each triple is in one of them."""
    from kdtorch.relations import _pairs

    student, teacher = (torch.from_numpy(x) for x in drawn(batch=40))
    for name in NAMES:
        evaluate = functools.partial(torch.func.grad_and_value(getattr(kdtorch, name)), student, teacher)
        slope, value = evaluate()
        monkeypatch.setattr(_pairs, "BLOCK", 7 * 40)
        torch.testing.assert_close(evaluate(), (slope, value), rtol=1e-12, atol=1e-12)
        monkeypatch.undo()
