"""Strict from day one: dtype promotion, rank promotion, and 64-bit numbers where they are asked for."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def float64_in_jax():
    """For the tests in this folder; the examples of the docstrings run as a user would run them."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
