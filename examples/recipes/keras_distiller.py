"""Losses of this library inside `keras.distillation.Distiller`, with JAX or PyTorch as Keras' backend.

    KERAS_BACKEND=jax python examples/recipes/keras_distiller.py
    KERAS_BACKEND=torch python examples/recipes/keras_distiller.py

`Loss` turns any loss into a `DistillationLoss` of the logits, or of a layer's output. `Distiller` passes the labels to
it.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported

import keras
from _digits import test, train

if keras.backend.backend() == "jax":
    from kdjax import dkd_loss, similarity_loss
else:
    from kdtorch import dkd_loss, similarity_loss


class Loss(keras.distillation.DistillationLoss):
    """`function(student, teacher, **settings)`, or `function(student, teacher, labels, **settings)`."""

    def __init__(self, function, *, layer=None, takes_labels=False, **settings):
        self.function, self.takes_labels, self.settings = function, takes_labels, settings
        self.teacher_layer_name = self.student_layer_name = layer  # None: the model's output
        self.labels = None

    def compute_loss(self, teacher_outputs, student_outputs, **kwargs):  # the teacher comes first in Keras
        labels = [self.labels] if self.takes_labels else []
        return self.function(student_outputs, teacher_outputs, *labels, **self.settings)


class Distiller(keras.distillation.Distiller):
    """Keras does not pass labels to a `DistillationLoss`; this class does."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        for loss in self.distillation_losses:
            loss.labels = y
        total = super().compute_loss(x, y, y_pred, sample_weight, training)
        for loss in self.distillation_losses:
            loss.labels = None  # traced arrays of JAX must not be kept
        return total


def network(width):
    layers = keras.layers
    embedding = layers.Dense(width, activation="relu", name="embedding")
    return keras.Sequential([keras.Input((8, 8)), layers.Flatten(), embedding, layers.Dense(10)])


keras.utils.set_random_seed(0)
(images, labels), (test_images, test_labels) = train(), test()
hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
teacher, student = network(128), network(24)
teacher.compile(keras.optimizers.Adam(1e-2), hard)
teacher.fit(images, labels, batch_size=100, epochs=20, verbose=0)

distiller = Distiller(
    teacher,
    student,
    [
        Loss(dkd_loss, takes_labels=True, alpha=1.0, beta=2.0, temperature=2.0),
        Loss(similarity_loss, layer="embedding"),  # takes embeddings of different widths
    ],
    distillation_loss_weights=[1.0, 100.0],
    student_loss_weight=0.5,  # and 0.5 for the sum of the others
)
distiller.compile(keras.optimizers.Adam(1e-2), hard, metrics=["accuracy"])
history = distiller.fit(images, labels, batch_size=100, epochs=10, verbose=0).history

# what Keras reports as "distillation_loss" is the weighted sum of these
report = distiller.evaluate(images, labels, batch_size=1000, verbose=0, return_dict=True)
first, last = history["distillation_loss"][0], history["distillation_loss"][-1]
accuracy = float((student.predict(test_images, verbose=0).argmax(-1) == test_labels).mean())
print(f"loss {first:.2f} -> {last:.2f}; the student is right on {accuracy:.1%} of the test images")
