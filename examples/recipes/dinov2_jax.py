"""Self-supervised training in JAX as in DINOv2: DINO, iBOT and KoLeo on a tiny vision transformer, without a label.

    python examples/recipes/dinov2_jax.py

The student sees two views of each image, in half of which some patches are masked. It predicts what its own moving average
outputs for the other view (DINO) and for the masked patches (iBOT), while KoLeo keeps the images' features apart. The average is
centred, or balanced by Sinkhorn-Knopp. In the end every test image is given the label of the nearest of 20 labelled ones.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from _digits import test, told, views
from flax import linen

from kdjax import dino_init, dino_loss, ibot_init, ibot_loss, koleo_loss, sinkhorn_knopp

WIDTH, PROTOTYPES = 48, 64


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class ViT(linen.Module):
    """16 patches of 2 × 2 pixels and a class token; the outputs are cosines with prototypes, as in DINO's head."""

    @linen.compact
    def __call__(self, images, mask=None):
        """The feature of each image, and the outputs of the class token and of the patches."""
        tokens = self.param("tokens", linen.initializers.normal(0.5), (2, WIDTH))  # the class token and the mask token
        patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        patches = linen.Dense(WIDTH)(patches)
        if mask is not None:
            patches = jnp.where(mask[..., None], tokens[1], patches)
        x = jnp.concatenate([jnp.broadcast_to(tokens[0], (len(images), 1, WIDTH)), patches], 1)
        x = x + self.param("places", linen.initializers.normal(0.5), (1, 17, WIDTH))
        for _ in range(2):
            x = x + linen.MultiHeadDotProductAttention(4)(linen.LayerNorm()(x))
            x = x + linen.Dense(WIDTH)(linen.relu(linen.Dense(2 * WIDTH)(linen.LayerNorm()(x))))
        x = linen.LayerNorm()(x)
        prototypes = self.param("prototypes", linen.initializers.normal(1.0), (PROTOTYPES, WIDTH))
        outputs = unit(x) @ unit(prototypes).T
        return x[:, 0], outputs[:, 0], outputs[:, 1:]


net = ViT()
optimizer = optax.adamw(2e-3, weight_decay=0.01)


def draw_mask(key, number):
    """Mask a third of the patches in half of the images."""
    return (jax.random.uniform(key, (number, 16)) < 1 / 3) & (jnp.arange(number) % 2 == 0)[:, None]


def objective(params, average, states, both, mask, assignments):
    stacked = both.reshape(-1, 8, 8)  # [2 * 64, 8, 8]: the first views, then the second
    _, images, patches = net.apply(average, stacked)
    of_images = of_patches = None
    if assignments:  # over all images of the batch, and over all masked patches
        of_images = sinkhorn_knopp(images, temperature=0.04).reshape(2, -1, PROTOTYPES)
        of_patches = sinkhorn_knopp(patches.reshape(-1, PROTOTYPES), temperature=0.04, where=mask.reshape(-1))
        of_patches = of_patches.reshape(patches.shape)
    features, our_images, our_patches = net.apply(params, stacked, mask)
    pairs = (x.reshape(2, -1, PROTOTYPES) for x in (our_images, images))
    dino, of_classes = dino_loss(*pairs, states[0], teacher_targets=of_images)
    ibot, of_masked = ibot_loss(our_patches, patches, mask, states[1], teacher_targets=of_patches)
    koleo = sum(koleo_loss(x) for x in jnp.split(features, 2))  # one view at a time
    return dino + ibot + 0.1 * koleo, (of_classes, of_masked)


@functools.partial(jax.jit, static_argnames="assignments")
def step(carry, both, key, assignments):
    params, average, moments, states = carry
    mask = draw_mask(key, 2 * both.shape[1])
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    (loss, states), gradient = value_and_grad(params, average, states, both, mask, assignments)
    updates, moments = optimizer.update(gradient, moments, params)
    params = optax.apply_updates(params, updates)
    average = optax.incremental_update(params, average, 0.02)  # 0.98 of itself and 0.02 of the student
    return (params, average, moments, states), loss


def learn(params, assignments):
    """Train; returns the average of the student, and the loss of each step."""
    states = dino_init(PROTOTYPES), ibot_init(PROTOTYPES)
    carry, losses = (params, params, optimizer.init(params), states), []
    for i, both in enumerate(views(steps=STEPS, seed=0)):
        carry, loss = step(carry, both, jax.random.key(i), assignments)
        losses.append(float(loss))
    return carry[1], losses


@jax.jit
def accuracy(params):
    """The accuracy of the label of the nearest labelled image."""
    known, images = (unit(net.apply(params, x)[0]) for x in (told()[0], test()[0]))
    nearest = (images @ known.T).argmax(1)
    return (jnp.asarray(told()[1])[nearest] == test()[1]).mean()


STEPS = 200
nets = {"untrained": net.init(jax.random.key(0), told()[0], jnp.zeros((20, 16), bool))}
nets["centre"], losses = learn(nets["untrained"], assignments=False)
nets["assignments"], other_losses = learn(nets["untrained"], assignments=True)
accuracies = {name: float(accuracy(params)) for name, params in nets.items()}
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; with Sinkhorn-Knopp {other_losses[0]:.2f} -> {other_losses[-1]:.2f}")
print(
    "20 labels: untrained {untrained:.1%}; centred {centre:.1%}; Sinkhorn-Knopp {assignments:.1%}".format(**accuracies)
)
