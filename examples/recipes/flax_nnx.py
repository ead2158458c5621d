"""Distillation in Flax NNX and Optax: one jitted step, which takes the teacher's logits.

    python examples/recipes/flax_nnx.py

The teacher is called outside the step; its logits could as well be read from disk.
"""

import optax
from _digits import batches, teacher, test
from flax import nnx

from kdjax import dkd_loss

taught = teacher("jax")  # a small CNN trained on the digits; any function of images works
rngs = nnx.Rngs(0)
student = nnx.Sequential(
    lambda images: images.reshape(len(images), -1),
    nnx.Linear(64, 32, rngs=rngs),
    nnx.relu,
    nnx.Linear(32, 10, rngs=rngs),
)
optimizer = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def step(student, optimizer, images, labels, teacher_logits):
    def objective(student):
        logits = student(images)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        soft = dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=2.0, temperature=2.0)
        return hard + soft

    loss, gradients = nnx.value_and_grad(objective)(student)
    optimizer.update(student, gradients)
    return loss


ask = nnx.jit(lambda images: taught(images).logits)  # outside the step, so the teacher is not differentiated
losses = []
for images, labels in batches(steps=100):
    losses.append(step(student, optimizer, images, labels, ask(images)))

images, labels = test()
accuracy = float((student(images).argmax(-1) == labels).mean())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {accuracy:.1%} of the test images")
