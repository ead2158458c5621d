"""MiniLMv2 in PyTorch: a transformer learns the relations between bytes from a wider and deeper one.

    python examples/recipes/minilm_torch.py

`minilm_loss` compares the queries, the keys and the values of the two last layers; widths and numbers of heads differ.
"""

import torch
from _text import BYTES, LENGTH, batches
from torch import nn
from torch.nn import functional

from kdtorch import minilm_loss


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        qkv = self.into(self.norm1(x)).chunk(3, -1)
        parts = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), qkv


class Model(nn.Module):
    """The logits of the next byte, and the last layer's queries, keys and values, `[batch, positions, width]`."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.tokens, self.places = nn.Embedding(BYTES, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.logits = nn.Linear(width, BYTES)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places
        for layer in self.layers:
            x, qkv = layer(x)
        return self.logits(x), qkv


def next_byte(model, tokens):
    logits = model(tokens)[0][:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=0)


def relations(model, tokens):
    with torch.no_grad():
        _, taught = teacher(tokens)
    pairs = zip(model(tokens)[1], taught, strict=True)
    return sum(minilm_loss(s, t, relation_heads=6, where=tokens > 0) for s, t in pairs)


def train(model, objective, steps, seed):
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for tokens in batches(steps, seed):
        loss = objective(model, torch.from_numpy(tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
teacher = Model(width=48, heads=4, layers=2)
lessons = train(teacher, next_byte, steps=150, seed=0)
student = Model(width=24, heads=2, layers=1)
losses = train(student, relations, steps=150, seed=1)
print(f"teacher {lessons[0]:.2f} to {lessons[-1]:.2f}")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
