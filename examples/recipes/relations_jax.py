"""Relations in Flax NNX: a teacher whose features are wider than the student's.

    python examples/recipes/relations_jax.py

CRD stores an embedding of every image of the data set, so it needs each image's position in the data set.
"""

import jax.numpy as jnp
import numpy as np
import optax
from _digits import teacher, test, train
from flax import nnx

import kdjax
from kdjax.nn import CRDLoss

images, labels = map(jnp.asarray, train())
wide = teacher("jax")  # a small CNN trained on the digits
taught = nnx.jit(lambda images: wide(images).embedding)(images)  # [1000, 64]
rngs = nnx.Rngs(0)
crd = CRDLoss(32, 64, 16, num_data=len(images), num_negatives=128, rngs=rngs)
# a module or None, and a function of the module, the student's features (32 wide), the teacher's, and the images'
# indices
RELATIONS = {
    "crd": (crd, lambda module, student, teacher, index: 0.1 * module(student, teacher, index)),
    "rkd": (None, lambda module, student, teacher, index: 0.1 * kdjax.rkd_loss(student, teacher)),
    "similarity": (None, lambda module, student, teacher, index: 100 * kdjax.similarity_loss(student, teacher)),
}


class Student(nnx.Module):
    def __init__(self, relation):
        self.body, self.head, self.relation = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs), relation

    def features(self, images):
        return nnx.relu(self.body(images.reshape(len(images), -1)))


results = {}
for name, (module, relation) in RELATIONS.items():
    student = Student(module)
    optimizer, draw, losses = nnx.Optimizer(student, optax.adam(1e-2), wrt=nnx.Param), np.random.default_rng(0), []

    @nnx.jit
    def step(student, optimizer, index, relation=relation):
        def objective(student):
            features = student.features(images[index])
            told = relation(student.relation, features, taught[index], index)
            hard = optax.losses.softmax_cross_entropy_with_integer_labels(student.head(features), labels[index])
            return hard.mean() + told, told

        (_, told), gradients = nnx.value_and_grad(objective, has_aux=True)(student)
        optimizer.update(student, gradients)
        return told

    for _ in range(150):
        index = jnp.asarray(draw.choice(len(images), 64, replace=False), "int32")
        losses.append(step(student, optimizer, index))
    right = student.head(student.features(jnp.asarray(test()[0]))).argmax(-1) == test()[1]
    results[name] = losses, float(right.mean())
    print(
        f"{name} {losses[0]:.3f} -> {losses[-1]:.3f}; the student is right on {results[name][1]:.1%} of the test images"
    )
