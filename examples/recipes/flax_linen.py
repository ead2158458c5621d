"""Distillation in Flax Linen and Optax: only functions and trees, without objects that hold state.

    python examples/recipes/flax_linen.py

A step takes the weights and the state of the optimiser, and returns the new ones.
"""

import jax
import optax
from _digits import batches, teacher, test
from flax import linen, nnx

from kdjax import kl_loss


class Student(linen.Module):
    @linen.compact
    def __call__(self, images):
        hidden = linen.relu(linen.Dense(32)(images.reshape(len(images), -1)))
        return linen.Dense(10)(hidden)


student, optimizer, taught = Student(), optax.adam(1e-2), teacher("jax")
ask = nnx.jit(lambda images: taught(images).logits)  # or a Linen teacher's apply


def objective(params, images, labels, teacher_logits):
    logits = student.apply(params, images)
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return hard + kl_loss(logits, teacher_logits, temperature=4.0)  # multiplied by T², so the weights stay


@jax.jit
def step(params, moments, *batch):
    loss, gradients = jax.value_and_grad(objective)(params, *batch)
    updates, moments = optimizer.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, loss


images, labels = test()
params = student.init(jax.random.key(0), images)
moments = optimizer.init(params)
losses = []
for batch in batches(steps=100):
    params, moments, loss = step(params, moments, *batch, ask(batch[0]))
    losses.append(loss)

accuracy = float((student.apply(params, images).argmax(-1) == labels).mean())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {accuracy:.1%} of the test images")
