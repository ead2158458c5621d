"""Strict from day one: dtype promotion, rank promotion, 64-bit numbers where they are asked for."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
