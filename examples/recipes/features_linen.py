"""Feature maps of Flax Linen models that cannot be edited: `capture_intermediates` of `apply`.

    python examples/recipes/features_linen.py

Attention transfer compares maps with any numbers of channels. CWD and the squared error need the teacher's number, to which
a `Projector` maps the student's channels. It is an NNX module, which `nnx.split` turns into a tree of weights.
"""

import jax
import optax
from _digits import SETTING, batches, teacher, test
from flax import linen, nnx

from kdjax import attention_transfer_loss, cwd_loss, mse_loss
from kdjax.nn import Projector


class Student(linen.Module):  # a given network; its convolutions have 4 and 6 channels
    @linen.compact
    def __call__(self, images):
        first = linen.relu(linen.Conv(4, (3, 3))(images[..., None]))
        second = linen.relu(linen.Conv(6, (3, 3))(linen.max_pool(first, (2, 2), (2, 2))))
        return linen.Dense(10)(second.reshape(len(second), -1))


LAYERS = "Conv_0", "Conv_1"


def maps_of(model, params, images):
    """The logits, and the outputs of the layers with these names, in this model before the activation."""
    logits, state = model.apply(
        params,
        images,
        capture_intermediates=lambda module, method: module.name in LAYERS and method == "__call__",
        mutable=["intermediates"],
    )
    return logits, [linen.relu(state["intermediates"][name]["__call__"][0]) for name in LAYERS]


student, optimizer, taught = Student(), optax.adam(1e-2), teacher("jax")
ask = nnx.jit(lambda images: taught(images).maps)  # or maps_of a Linen teacher
rngs = nnx.Rngs(0)
graph, project = nnx.split(
    nnx.List(Projector(a, b, rngs=rngs) for a, b in zip((4, 6), SETTING.teacher[0], strict=True))
)


def objective(weights, images, labels, theirs):
    logits, ours = maps_of(student, weights["student"], images)
    first, second = nnx.merge(graph, weights["project"])
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    terms = {
        "attention": 100 * attention_transfer_loss(ours, theirs),
        "cwd": cwd_loss(second(ours[1]), theirs[1], temperature=2.0),
        "mse": mse_loss(first(ours[0]), theirs[0]),
    }
    return hard + sum(terms.values()), terms


@jax.jit
def step(weights, moments, *batch):
    (_, terms), gradients = jax.value_and_grad(objective, has_aux=True)(weights, *batch)
    updates, moments = optimizer.update(gradients, moments, weights)
    return optax.apply_updates(weights, updates), moments, terms


images, labels = test()
weights = {"student": student.init(jax.random.key(0), images), "project": project}
moments = optimizer.init(weights)
losses = []
for batch in batches(steps=100):
    weights, moments, terms = step(weights, moments, *batch, ask(batch[0]))
    losses.append(terms)

accuracy = float((student.apply(weights["student"], images).argmax(-1) == labels).mean())
print(", ".join(f"{name} {losses[0][name]:.3f} -> {losses[-1][name]:.3f}" for name in terms))
print(f"the student is right on {accuracy:.1%} of the test images")
