"""A teacher with another tokenizer, in JAX: `uld_loss` where both have read the same text.

    python examples/recipes/tokenizers_jax.py

The student uses byte pairs with a vocabulary of 128 tokens, its teacher with 256. The universal logit distillation loss
compares sorted probabilities: how sure the teacher is, but not of which token. So it needs a cross-entropy beside it.
"""

import math

import jax
import jax.numpy as jnp
import optax
from _spans import TEST, TRAIN, aligned, batches, tokenizer
from flax import nnx

from kdjax import uld_loss

STUDENT, TEACHER = tokenizer(128), tokenizer(256)


class Model(nnx.Module):
    """The logits of the next token, from the last six tokens."""

    def __init__(self, vocabulary, width, rngs):
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.inner = nnx.Linear(6 * width, 4 * width, rngs=rngs)
        self.logits = nnx.Linear(4 * width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        padded = jnp.pad(tokens, ((0, 0), (5, 0)))
        past = jnp.stack([padded[:, i : i + tokens.shape[1]] for i in range(6)], -1)
        return self.logits(nnx.relu(self.inner(self.tokens(past).reshape(*tokens.shape, -1))))


def next_token(model, tokens):
    """The cross-entropy of each token, 0 for padding."""
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:])
    return jnp.where(tokens[:, 1:] > 0, loss, 0)


def mean_next_token(model, tokens):
    return next_token(model, tokens).sum() / (tokens[:, 1:] > 0).sum()


def universal(model, batch, teacher):
    taught = teacher(batch["teacher"])  # constant in the loss
    ours = jnp.take_along_axis(model(batch["student"]), batch["student_places"][..., None], 1)
    theirs = jnp.take_along_axis(taught, batch["teacher_places"][..., None], 1)
    return uld_loss(ours, theirs, where=batch["where"])


def train(model, data, objective, steps=100, teacher=None):
    optimizer, losses = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param), []

    @nnx.jit
    def step(model, optimizer, batch, teacher):
        loss, gradients = nnx.value_and_grad(objective)(model, batch, teacher)
        optimizer.update(model, gradients)
        return loss

    for batch in batches(data, steps):
        batch = {name: jnp.asarray(x, x.dtype if x.dtype == bool else "int32") for name, x in batch.items()}
        losses.append(float(step(model, optimizer, batch, teacher)))
    return losses


@nnx.jit
def total(model, tokens):
    return next_token(model, tokens).sum()


def bits_per_byte(model, tokens, texts):
    return float(total(model, jnp.asarray(tokens, "int32"))) / math.log(2) / sum(map(len, texts))


data, held_back = aligned(TRAIN, STUDENT, TEACHER), aligned(TEST, STUDENT, TEACHER)
share = data["where"].sum() / (data["student"] > 0).sum()
print(f"{share:.0%} of the student's positions are shared")
teacher = Model(256, 32, nnx.Rngs(0))
train(teacher, data, lambda model, batch, _: mean_next_token(model, batch["teacher"]), steps=200)
print(f"teacher: {bits_per_byte(teacher, held_back['teacher'], TEST):.2f} bits a byte of the test lines")
WAYS = {
    "cross-entropy": lambda model, batch, _: mean_next_token(model, batch["student"]),
    "cross-entropy and ULD": lambda model, batch, teacher: (
        mean_next_token(model, batch["student"]) + universal(model, batch, teacher)
    ),
    "ULD alone": universal,
}
losses, bits = {}, {}
for name, objective in WAYS.items():
    student = Model(128, 16, nnx.Rngs(1))
    before = bits_per_byte(student, held_back["student"], TEST)
    losses[name] = train(student, data, objective, teacher=teacher)
    bits[name] = before, bits_per_byte(student, held_back["student"], TEST)
    first, last = losses[name][0], losses[name][-1]
    print(f"{name}: loss {first:.2f} -> {last:.2f}, bits a byte of the test lines {before:.2f} -> {bits[name][1]:.2f}")

# the limit of this loss: a teacher with shuffled tokens gives the same value
logits = jax.random.normal(jax.random.key(0), (4, 128))
shuffled = jax.random.permutation(jax.random.key(1), logits, axis=1)
blind = float(uld_loss(logits, shuffled))
print(f"the loss between logits and the same ones shuffled is {blind:.0f}")
