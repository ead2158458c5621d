"""Mixed precision in JAX: the student computes in bfloat16 on float32 weights, the loss in float32.

    python examples/recipes/bfloat16_jax.py

A loss computes in float32 for any input dtype, and its gradient has the dtype of the logits.
"""

import jax.numpy as jnp
import optax
from _digits import batches, teacher, test
from flax import nnx

from kdjax import dkd_loss

taught = teacher("jax")
rngs = nnx.Rngs(0)
student = nnx.Sequential(  # `dtype` is for computation, `param_dtype` (float32) for the weights
    lambda images: images.reshape(len(images), -1),
    nnx.Linear(64, 32, dtype=jnp.bfloat16, rngs=rngs),
    nnx.relu,
    nnx.Linear(32, 10, dtype=jnp.bfloat16, rngs=rngs),
)
optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)


def objective(student, images, labels, teacher_logits):
    logits = student(images)  # bfloat16
    # Optax computes in the dtype of its inputs, so convert them to float32; kdjax does that itself
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
    return hard + dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=2.0, temperature=2.0), logits


@nnx.jit
def step(student, optimizer, *batch):
    (loss, logits), gradients = nnx.value_and_grad(objective, has_aux=True)(student, *batch)
    optimizer.update(student, gradients)  # bfloat16 has the range of float32: the loss need not be scaled
    return loss, logits


ask = nnx.jit(lambda images: taught(images).logits.astype(jnp.bfloat16))  # half the memory, if they are stored
losses = []
for images, labels in batches(steps=100):
    loss, logits = step(student, optimizer, images, labels, ask(images))
    losses.append(loss)

images, labels = test()
accuracy = float((student(images).argmax(-1) == labels).mean())
print(f"logits {logits.dtype}, loss {loss.dtype}, weights {student.layers[1].kernel.dtype}")
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {accuracy:.1%} of the test images")
