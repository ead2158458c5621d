"""A `distill_step` for Flax NNX: student, teacher, several losses with their weights, and values to log.

    python examples/recipes/distill_step_jax.py
    tensorboard --logdir out/tensorboard

To add a loss, add a line to `LOSSES`. The step returns a dictionary of numbers, which this example writes to
TensorBoard.
"""

import optax
from _digits import batches, teacher, test
from _digits_jax import Net
from flax import nnx
from tensorboard.summary import Writer  # needs neither PyTorch nor TensorFlow

from kdjax import attention_transfer_loss, dkd_loss, similarity_loss

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
LOSSES = {  # a weight, and a function of the outputs of student and teacher and of the labels
    "hard": (1.0, lambda ours, theirs, labels: cross_entropy(ours.logits, labels).mean()),
    "dkd": (1.0, lambda ours, theirs, labels: dkd_loss(ours.logits, theirs.logits, labels, beta=2.0)),
    "attention": (100.0, lambda ours, theirs, labels: attention_transfer_loss(ours.maps, theirs.maps)),
    "similarity": (1000.0, lambda ours, theirs, labels: similarity_loss(ours.embedding, theirs.embedding)),
}


@nnx.jit
def distill_step(student, teacher, optimizer, images, labels):
    theirs = teacher(images)

    def objective(student):
        ours = student(images)
        terms = {name: loss(ours, theirs, labels) for name, (_, loss) in LOSSES.items()}
        return sum(weight * terms[name] for name, (weight, _) in LOSSES.items()), (terms, ours.logits)

    (total, (terms, logits)), gradients = nnx.value_and_grad(objective, has_aux=True)(student)
    optimizer.update(student, gradients)
    agreement = (logits.argmax(-1) == theirs.logits.argmax(-1)).mean()
    return {**terms, "total": total, "gradient": optax.tree.norm(gradients), "agreement": agreement}


student, taught = Net((4, 6), 20, 10, rngs=nnx.Rngs(0)), teacher("jax")
optimizer = nnx.Optimizer(student, optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-2)), wrt=nnx.Param)
writer, logs = Writer("out/tensorboard/distill_step_jax"), []
for number, (images, labels) in enumerate(batches(steps=100)):
    logs.append({name: float(x) for name, x in distill_step(student, taught, optimizer, images, labels).items()})
    for name, value in logs[-1].items():
        writer.add_scalar(name, value, number)
writer.close()

images, labels = test()
accuracy = float((nnx.jit(student)(images).logits.argmax(-1) == labels).mean())
for name in logs[0]:
    print(f"{name:10} {logs[0][name]:7.4f} -> {logs[-1][name]:7.4f}")
print(f"the student is right on {accuracy:.1%} of the test images")
