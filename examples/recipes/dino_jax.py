"""Self-distillation in JAX: DINO, where the teacher is the student's own moving average.

    python examples/recipes/dino_jax.py

20 of 1,000 images have a label. On all images the student predicts, from one view of an image, what its average outputs
for another view. For comparison, three students are trained with this loss and three without it. A step takes and
returns all that it changes: weights, their average, the optimiser's moments, and DINO's centre.
"""

import jax
import jax.numpy as jnp
import optax
from _digits import test, told, views
from flax import linen

from kdjax import dino_init, dino_loss

student = linen.Sequential([lambda x: x.reshape(len(x), -1), linen.Dense(64), linen.relu, linen.Dense(10)])
optimizer = optax.adam(1e-2)
labelled_images, labels = told()


def objective(params, average, state, both, weight):
    logits = student.apply(params, labelled_images)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    ours, theirs = (jax.vmap(student.apply, (None, 0))(p, both) for p in (params, average))  # [2, 64, 10]
    # with only 10 classes, the published temperatures, 0.04 and 0.1, are too sharp
    dino, state = dino_loss(ours, theirs, state, teacher_temperature=0.5, student_temperature=1.0)
    return loss + weight * dino, state


@jax.jit
def step(carry, both, weight):
    params, average, moments, state = carry
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    (loss, state), gradient = value_and_grad(params, average, state, both, weight)
    updates, moments = optimizer.update(gradient, moments, params)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, 0.03)  # 0.97 of itself and 0.03 of the student
    return (params, average, moments, state), loss


def distil(weight, seed):
    """Train; returns the student's weights, their average, and the loss of each step."""
    params = student.init(jax.random.key(seed), labelled_images)
    carry, losses = (params, params, optimizer.init(params), dino_init(10)), []
    for both in views(steps=200, seed=seed):
        carry, loss = step(carry, both, weight)
        losses.append(loss)
    return *carry[:2], losses


@jax.jit
def accuracy(params):
    images, labels = test()
    return (student.apply(params, images).argmax(-1) == labels).mean()


alone, _, _ = zip(*(distil(0.0, seed) for seed in range(3)), strict=True)
students, teachers, losses = zip(*(distil(1.0, seed) for seed in range(3)), strict=True)
nets = {"alone": alone, "student": students, "teacher": teachers}
accuracies = {name: float(jnp.mean(jnp.array([accuracy(x) for x in params]))) for name, params in nets.items()}
print(f"loss {losses[0][0]:.2f} -> {losses[0][-1]:.2f}")
print("20 labels alone {alone:.1%}; with DINO {student:.1%}, its average {teacher:.1%}".format(**accuracies))
