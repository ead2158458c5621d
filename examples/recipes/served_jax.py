"""A teacher behind a serving engine, for a student in JAX: its likeliest tokens are recorded once and read in each epoch.

    python examples/recipes/served_jax.py

The engine returns the log-probabilities of 16 out of 128 tokens. Two writers record them without padding, as two ranks
would. `read` places them where the mask of the batch is True, so that the step is compiled once. `topk_kl_loss`
compares the 16 tokens and the rest.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _served import BATCH, HELD_OUT, LEARNED, batches, teacher, tokens
from _text import BYTES
from flax import linen

from kdjax import kl_loss, topk_kl_loss
from kdjax.teacher_cache import TeacherCache, record_teacher


class Student(linen.Module):
    """The logits of the next byte, from the last two bytes."""

    @linen.compact
    def __call__(self, x):
        before = jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]
        both = jnp.concatenate([linen.Embed(BYTES, 64)(x), linen.Embed(BYTES, 64)(before)], -1)
        return linen.Dense(BYTES)(linen.relu(linen.Dense(128)(both)))


student, optimizer = Student(), optax.adam(3e-3)
x = jnp.asarray(tokens(HELD_OUT, np.arange(len(HELD_OUT))))
where = np.arange(x.shape[1]) < np.array([[len(line) - 1] for line in HELD_OUT])
everything = jnp.asarray(np.concatenate([teacher(line) for line in HELD_OUT]), jnp.float32)
params = student.init(jax.random.key(0), x)
moments = optimizer.init(params)


def divergence():
    """The KL divergence to the teacher's whole distribution, on lines that were not recorded."""
    return float(kl_loss(student.apply(params, x)[where], everything))


@jax.jit
def step(params, moments, x, taught):
    def loss(params):
        logits = student.apply(params, x)
        return topk_kl_loss(logits, taught["values"], taught["indices"], taught["rest"], where=taught["where"])

    value, gradient = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value


divergences, losses = [divergence()], []
with tempfile.TemporaryDirectory() as folder:
    for rank in range(2):  # usually separate processes, each with a share of the lines
        record_teacher(folder, batches(rank, 2), num_classes=BYTES, part=rank, parts=2)
    cache = TeacherCache(folder, num_classes=BYTES)
    print(f"{len(cache)} lines, {cache.lengths.sum()} tokens")
    draw = np.random.default_rng(0)
    for _ in range(200):
        index = draw.choice(len(LEARNED), BATCH, replace=False)
        batch = tokens(LEARNED, index)
        mask = np.arange(batch.shape[1]) < np.array([[len(LEARNED[i]) - 1] for i in index])
        taught = cache.read(index, temperature=1.0, where=mask)
        params, moments, value = step(params, moments, jnp.asarray(batch), taught)
        losses.append(float(value))
divergences.append(divergence())
print(f"loss {losses[0]:.2f} -> {np.mean(losses[-5:]):.2f}")
print(f"KL to the whole teacher on other lines {divergences[0]:.2f} -> {divergences[1]:.2f}")
