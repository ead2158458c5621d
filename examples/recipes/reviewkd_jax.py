"""ReviewKD in Flax NNX: the student's feature maps, fused from deep to shallow by connectors, against the teacher's.

    python examples/recipes/reviewkd_jax.py

The connectors are trained with the student and not needed afterwards.
"""

import optax
from _digits import SETTING, batches, teacher, test
from _digits_jax import Net
from flax import nnx

from kdjax import hcl_loss
from kdjax.nn import ReviewKD

taught = teacher("jax")  # maps of 8 and 16 channels, [batch, 8, 8, 8] and [batch, 4, 4, 16]
rngs = nnx.Rngs(0)
model = nnx.Dict(
    student=Net((4, 6), 20, 10, rngs=rngs),  # the same two convolutions, narrower: maps of 4 and 6 channels
    review=ReviewKD([4, 6], SETTING.teacher[0], mid_channels=8, rngs=rngs),  # to the teacher's channels
)
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)  # for both; the connectors' batch norm is state


@nnx.jit
def step(model, optimizer, images, labels, theirs, weight):
    def objective(model):
        logits, _, ours = model.student(images)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        hierarchical = hcl_loss(model.review(ours), theirs)  # equally many maps, of equal shapes; any height and width
        return hard + weight * hierarchical, hierarchical

    (_, hierarchical), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    return hierarchical


ask = nnx.jit(lambda images: taught(images).maps)
warm_up = optax.schedules.linear_schedule(0.0, 1.0, 50)  # because the connectors start with random weights
losses = []
for i, (images, labels) in enumerate(batches(steps=100)):
    losses.append(step(model, optimizer, images, labels, ask(images), warm_up(i)))

images, labels = test()
accuracy = float((nnx.jit(model.student)(images).logits.argmax(-1) == labels).mean())
print(f"hcl {losses[0]:.3f} -> {losses[-1]:.3f}; the student is right on {accuracy:.1%} of the test images")
