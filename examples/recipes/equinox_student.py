"""Distillation in Equinox and Optax: the student is a PyTree, and a loss is a function of arrays like any other.

    python examples/recipes/equinox_student.py

The model takes one image at a time, and `jax.vmap` applies it to a batch; the losses take the whole batch.
"""

import equinox as eqx
import jax
import optax
from _digits import batches, teacher, test
from flax import nnx

from kdjax import dkd_loss

taught = teacher("jax")  # a small CNN trained on the digits; any function of images works
ask = nnx.jit(lambda images: taught(images).logits)
student = eqx.nn.MLP(in_size=64, out_size=10, width_size=32, depth=1, key=jax.random.key(0))
optimizer = optax.adam(1e-2)
moments = optimizer.init(eqx.filter(student, eqx.is_inexact_array))


def predict(student, images):
    return jax.vmap(student)(images.reshape(len(images), -1))


@eqx.filter_jit
def step(student, moments, images, labels, teacher_logits):
    @eqx.filter_value_and_grad
    def objective(student):
        logits = predict(student, images)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return hard + dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=2.0, temperature=2.0)

    loss, gradients = objective(student)
    updates, moments = optimizer.update(gradients, moments, eqx.filter(student, eqx.is_inexact_array))
    return eqx.apply_updates(student, updates), moments, loss


losses = []
for images, labels in batches(steps=100):
    student, moments, loss = step(student, moments, images, labels, ask(images))
    losses.append(float(loss))

images, labels = test()
accuracy = float((predict(student, images).argmax(-1) == labels).mean())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {accuracy:.1%} of the test images")
