"""Gradient accumulation in JAX: a batch in four parts that gives the gradient of the whole batch.

    python examples/recipes/accumulation_jax.py

If the masks of the parts differ, the mean of their means is not the mean of the batch: add sums and divide once. A loss that
compares the examples of a batch with each other is not a sum over parts: it needs the logits of the whole batch, but
nothing else. The parts run one after another in `jax.lax.scan`, so that only one part needs memory at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from _digits import batches, teacher
from flax import linen, nnx

from kdjax import euclidean_mse_loss, kl_loss

taught = teacher("jax")
ask = nnx.jit(lambda images: taught(images).logits)
student = linen.Sequential([lambda x: x.reshape(len(x), -1), linen.Dense(32), linen.relu, linen.Dense(10)])
params, optimizer = student.init(jax.random.key(0), jnp.ones((1, 8, 8))), optax.adam(1e-2)


def parts(*batch):
    return tuple(x.reshape(4, -1, *x.shape[1:]) for x in batch)


def added(function, params, parts):
    """The sum over the parts of what the function returns for each."""

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(params, *part)), None

    first = jax.eval_shape(function, params, *(x[0] for x in parts))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, first), parts)[0]


def sums(loss, params, *batch):
    """Right for losses of single examples. A loss with a state gets `update=False` in all parts but the last."""

    def part(params, images, teacher_logits, kept):
        return loss(student.apply(params, images), teacher_logits, where=kept, reduction="sum") / batch[-1].sum()

    return added(jax.value_and_grad(part), params, parts(*batch))


def by_logits(loss, params, images, teacher_logits, where):
    """Right for every loss: the gradient for the logits of the whole batch is backpropagated in parts.

    The student runs twice and must give the same outputs both times, so without dropout. A state is updated once, by
    the whole batch.
    """
    logits = jax.lax.map(lambda x: student.apply(params, x), parts(images)[0]).reshape(len(images), -1)
    value, gradient = jax.value_and_grad(loss)(logits, teacher_logits, where=where)
    carry_on = lambda p, x, g: jax.vjp(lambda p: student.apply(p, x), p)[1](g)[0]  # noqa: E731
    return value, added(carry_on, params, parts(images, gradient))


def mixture(*logits, where):
    return kl_loss(*logits, temperature=4.0, where=where) + euclidean_mse_loss(*logits, where=where)


@jax.jit
def step(params, moments, *batch):
    loss, gradient = by_logits(mixture, params, *batch)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, loss


moments, losses, where = optimizer.init(params), [], jnp.arange(64) >= 8  # the first part keeps 8, the others 16
for images, _labels in batches(steps=60):
    batch = images, ask(images), where
    params, moments, loss = step(params, moments, *batch)
    losses.append(loss)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, each step in four parts")


@partial(jax.jit, static_argnums=0)
def off(loss, params, *batch):
    """How far each way is from the gradient of the batch, relative to its length."""
    _, right = jax.value_and_grad(lambda p: loss(student.apply(p, batch[0]), batch[1], where=batch[2]))(params)
    wrong = [optax.tree.sub(way(loss, params, *batch)[1], right) for way in (sums, by_logits)]
    return [optax.tree.norm(x) / optax.tree.norm(right) for x in wrong]


errors = {loss.__name__: off(loss, params, *batch) for loss in (kl_loss, euclidean_mse_loss)}
for name, (by_sums, through_logits) in errors.items():
    print(f"{name}: the gradient is off by {by_sums:.0e} of its length by sums, by {through_logits:.0e} by logits")
