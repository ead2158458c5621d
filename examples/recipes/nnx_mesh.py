"""A language model distilled with the techniques of large models in JAX: a mesh, remat, bfloat16, heads in the loss.

    python examples/recipes/nnx_mesh.py

The batch is spread over the mesh axis `data`, and wide weights over `model`, in this example on four of eight CPU
devices. Layers are computed again in the backward pass. The networks compute in bfloat16 with float32 weights. The loss
takes hidden states and heads, does not compute the logits of the whole batch, and is float32. The teacher has random
weights instead of a checkpoint.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from _text import BYTES, LENGTH, batches
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import linear_kl_loss

# before the first use of a device; leave it out if you have accelerators
jax.config.update("jax_num_cpu_devices", 8)
MESH = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
SPREAD = NamedSharding(MESH, P("data"))


def spread(init, *axes):
    return nnx.with_partitioning(init, axes)


class Layer(nnx.Module):
    def __init__(self, width, heads, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        init = nnx.initializers.lecun_normal()
        self.heads = heads
        self.norm1, self.norm2 = (nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs) for _ in range(2))
        self.into = linear(width, 3 * width, kernel_init=spread(init, None, "model"))
        self.out = linear(width, width, kernel_init=spread(init, "model", None))
        self.up = linear(width, 4 * width, kernel_init=spread(init, None, "model"))
        self.down = linear(4 * width, width, kernel_init=spread(init, "model", None))

    def __call__(self, x):
        parts = (y.reshape(*y.shape[:2], self.heads, -1) for y in jnp.split(self.into(self.norm1(x)), 3, -1))
        x = x + self.out(jax.nn.dot_product_attention(*parts, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.silu(self.up(self.norm2(x))))


class Model(nnx.Module):
    """Hidden states `[batch, positions, width]`, and the table of embeddings, which is also the head."""

    def __init__(self, width, heads, layers, rngs):
        init = nnx.initializers.normal(width**-0.5)
        self.tokens = nnx.Embed(BYTES, width, dtype=jnp.bfloat16, embedding_init=spread(init, "model", None), rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LENGTH, width)))
        self.layers = nnx.List([Layer(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.places[...][None, : tokens.shape[1]].astype(jnp.bfloat16)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return self.norm(x), self.tokens.embedding[...].astype(jnp.bfloat16)


@nnx.jit(static_argnums=(0, 1, 2))
def made(width, heads, layers):
    """A model; under `jax.set_mesh` each device creates only its own parts of the weights."""
    return Model(width, heads, layers, nnx.Rngs(0))


@functools.partial(jax.shard_map, mesh=MESH, in_specs=(P("data"), P(), P("data"), P(), P("data")), out_specs=P())
def divergence(hidden, head, teacher_hidden, teacher_head, where):
    """The sum over the tokens of all devices; each device computes the logits of its own tokens, in blocks."""
    heads = hidden, head, teacher_hidden, teacher_head
    options = {"temperature": 2.0, "where": where, "reduction": "sum", "axis_name": "data"}
    return jax.lax.pmean(linear_kl_loss(*heads, **options), "data")


def objective(model, tokens, taught, number):
    """The loss of a part, divided by the tokens of the whole batch, so that the parts can be added."""
    return divergence(*model(tokens[:, :-1]), *taught, tokens[:, 1:] > 0) / number


@nnx.jit
def step(model, optimizer, *batch):
    loss, gradients = nnx.value_and_grad(objective)(model, *batch)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def ask(teacher, tokens):
    """Run the teacher in its own program, whose activations are freed before the student's step."""
    return teacher(tokens[:, :-1])


with jax.set_mesh(MESH):
    teacher, student = made(64, 4, 2), made(32, 2, 1)
    optimizer, losses = nnx.Optimizer(student, optax.adam(3e-3), wrt=nnx.Param), []
    for tokens in batches(steps=60, size=16):
        tokens = jax.device_put(tokens.astype("int32"), SPREAD)
        losses.append(step(student, optimizer, tokens, ask(teacher, tokens), (tokens[:, 1:] > 0).sum()))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, in {losses[0].dtype}")
