"""MiniLMv2 in Flax NNX: a transformer learns the relations between bytes from a wider and deeper one.

    python examples/recipes/minilm_jax.py

`minilm_loss` compares the queries, the keys and the values of the two last layers; widths and numbers of heads differ.
"""

import jax
import jax.numpy as jnp
import optax
from _text import BYTES, LENGTH, batches
from flax import nnx

from kdjax import minilm_loss


class Layer(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.into, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        first, second = nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)
        self.mlp = nnx.Sequential(first, nnx.gelu, second)

    def __call__(self, x):
        qkv = jnp.split(self.into(self.norm1(x)), 3, -1)
        parts = (y.reshape(*y.shape[:2], self.heads, -1) for y in qkv)
        x = x + self.out(jax.nn.dot_product_attention(*parts, is_causal=True).reshape(x.shape))
        return x + self.mlp(self.norm2(x)), qkv


class Model(nnx.Module):
    """The logits of the next byte, and the last layer's queries, keys and values, `[batch, positions, width]`."""

    def __init__(self, width, heads, layers, rngs):
        self.tokens = nnx.Embed(BYTES, width, rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LENGTH, width)))
        self.layers = nnx.List([Layer(width, heads, rngs) for _ in range(layers)])
        self.logits = nnx.Linear(width, BYTES, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.places[...][None]
        for layer in self.layers:
            x, qkv = layer(x)
        return self.logits(x), qkv


def next_byte(model, tokens, _):
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(model(tokens)[0][:, :-1], tokens[:, 1:])
    return loss.mean(where=tokens[:, 1:] > 0)


def relations(model, tokens, taught):
    pairs = zip(model(tokens)[1], taught, strict=True)
    return sum(minilm_loss(s, t, relation_heads=6, where=tokens > 0) for s, t in pairs)


def train(model, objective, steps, seed, ask=lambda tokens: None):
    optimizer, losses = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param), []

    @nnx.jit
    def step(model, optimizer, tokens, taught):
        loss, gradients = nnx.value_and_grad(objective)(model, tokens, taught)
        optimizer.update(model, gradients)
        return loss

    for tokens in batches(steps, seed):
        tokens = jnp.asarray(tokens, "int32")
        losses.append(step(model, optimizer, tokens, ask(tokens)))
    return losses


teacher = Model(width=48, heads=4, layers=2, rngs=nnx.Rngs(0))
lessons = train(teacher, next_byte, steps=150, seed=0)
student = Model(width=24, heads=2, layers=1, rngs=nnx.Rngs(1))
losses = train(student, relations, steps=150, seed=1, ask=nnx.jit(lambda tokens: teacher(tokens)[1]))
print(f"teacher {lessons[0]:.2f} to {lessons[-1]:.2f}")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
