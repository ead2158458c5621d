"""Feature maps of Flax NNX models that cannot be edited: `nnx.capture` records the outputs of all methods.

    python examples/recipes/features_nnx.py

Attention transfer compares maps with any numbers of channels. CWD and the squared error need the teacher's number, to which
a `Projector` maps the student's channels; it is trained with the student and not needed afterwards.
"""

import optax
from _digits import SETTING, batches, teacher, test
from _digits_jax import Net
from flax import nnx

from kdjax import attention_transfer_loss, cwd_loss, mse_loss
from kdjax.nn import Projector


def maps_of(model, images):
    """The logits, and the output maps of the model's layers, in this model before the activation."""
    output, sown = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(images)
    return output.logits, [nnx.relu(sown[name]["__call__"][0]) for name in ("conv1", "conv2")]


taught = teacher("jax")  # maps of 8 and 16 channels
rngs = nnx.Rngs(0)
model = nnx.Dict(
    student=Net((4, 6), 20, 10, rngs=rngs),  # a given network; its convolutions have 4 and 6 channels
    project=nnx.List(Projector(a, b, rngs=rngs) for a, b in zip((4, 6), SETTING.teacher[0], strict=True)),
)
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, images, labels, theirs):
    def objective(model):
        logits, ours = maps_of(model.student, images)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        terms = {
            "attention": 100 * attention_transfer_loss(ours, theirs),
            "cwd": cwd_loss(model.project[1](ours[1]), theirs[1], temperature=2.0),
            "mse": mse_loss(model.project[0](ours[0]), theirs[0]),
        }
        return hard + sum(terms.values()), terms

    (_, terms), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    return terms


ask = nnx.jit(lambda taught, images: maps_of(taught, images)[1])
losses = []
for images, labels in batches(steps=100):
    losses.append(step(model, optimizer, images, labels, ask(taught, images)))

images, labels = test()
accuracy = float((nnx.jit(maps_of)(model.student, images)[0].argmax(-1) == labels).mean())
print(", ".join(f"{name} {losses[0][name]:.3f} -> {losses[-1][name]:.3f}" for name in losses[0]))
print(f"the student is right on {accuracy:.1%} of the test images")
