"""Several losses from a configuration in Flax NNX, each of them logged to TensorBoard.

    python examples/recipes/make_loss_jax.py
    tensorboard --logdir out/tensorboard

`terms` returns each loss by name, and `weigh` their weighted sum, which is minimised.
"""

import optax
from _digits import batches, teacher, test
from _digits_jax import Net
from flax import nnx
from tensorboard.summary import Writer  # needs neither PyTorch nor TensorFlow

from kdjax import make_loss

CONFIG = {
    "MODEL": {
        "METRIC_LOSS_TYPE": "kd-dkd-dcn-eu_mse",
        "KD_LOSS_WEIGHT": [1.0, 5.0, 0.5],
        "KD_LOSS_ARGS": {"dkd": {"beta": 2.0, "temperature": 2.0}},
        "FEAT_DIM": 64,  # width of the embeddings, for the class centres of dcn
    }
}

taught, rngs = teacher("jax"), nnx.Rngs(0)
model = nnx.Dict(
    student=Net((4, 6), 64, 10, rngs=rngs),  # an embedding as wide as the teacher's
    kd_loss=make_loss(CONFIG, num_classes=10, num_data=1000),  # dcn's centres are learned, so they are in the model
)
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, images, labels, theirs):
    def objective(model):
        ours = model.student(images)
        feat = {"stu": ours.embedding, "tea": theirs.embedding}
        feat |= {"score_stu": ours.logits, "score_tea": theirs.logits}
        terms = model.kd_loss.terms(feat=feat, target=labels)  # each loss by name, not weighted
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(ours.logits, labels).mean()
        loss = hard + model.kd_loss.weigh(terms)
        return loss, {**terms, "hard": hard, "loss": loss}

    (_, terms), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    return terms


ask, losses = nnx.jit(taught), []
writer = Writer("out/tensorboard/jax")
for images, labels in batches(steps=100):
    terms = step(model, optimizer, images, labels, ask(images))
    values = {name: float(value) for name, value in terms.items()}
    for name, value in values.items():
        writer.add_scalar(name, value, len(losses))
    losses.append(values)
writer.close()

images, labels = test()
accuracy = float((nnx.jit(model.student)(images).logits.argmax(-1) == labels).mean())
print(", ".join(f"{name} {losses[0][name]:.2f} -> {losses[-1][name]:.2f}" for name in losses[0]))
print(f"the student is right on {accuracy:.1%} of the test images; out/tensorboard has the curves")
