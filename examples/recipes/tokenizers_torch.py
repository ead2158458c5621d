"""A teacher with another tokenizer, in PyTorch: `uld_loss` where both have read the same text.

    python examples/recipes/tokenizers_torch.py

The student uses byte pairs with a vocabulary of 128 tokens, its teacher with 256. The universal logit distillation loss
compares sorted probabilities: how sure the teacher is, but not of which token. So it needs a cross-entropy beside it.
"""

import math

import torch
from _spans import TEST, TRAIN, aligned, batches, tokenizer
from torch import nn
from torch.nn import functional

from kdtorch import uld_loss

STUDENT, TEACHER = tokenizer(128), tokenizer(256)


class Model(nn.Module):
    """The logits of the next token, from the last six tokens."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.inner, self.logits = nn.Linear(6 * width, 4 * width), nn.Linear(4 * width, vocabulary)

    def forward(self, tokens):
        past = functional.pad(tokens, (5, 0)).unfold(1, 6, 1)
        return self.logits(self.inner(self.tokens(past).flatten(2)).relu())


def next_token(model, tokens, reduction="mean"):
    logits = model(tokens[:, :-1]).transpose(1, 2)
    return functional.cross_entropy(logits, tokens[:, 1:], ignore_index=0, reduction=reduction)


def universal(model, batch):
    logits, taught = model(batch["student"]), teacher(batch["teacher"]).detach()
    ours = logits.take_along_dim(batch["student_places"][..., None], 1)
    theirs = taught.take_along_dim(batch["teacher_places"][..., None], 1)
    return uld_loss(ours, theirs, where=batch["where"])


def train(model, data, objective, steps=100):
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for batch in batches(data, steps):
        loss = objective(model, {name: torch.from_numpy(x) for name, x in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def bits_per_byte(model, tokens, texts):
    total = next_token(model, torch.from_numpy(tokens), reduction="sum")
    return total.item() / math.log(2) / sum(map(len, texts))


data, held_back = aligned(TRAIN, STUDENT, TEACHER), aligned(TEST, STUDENT, TEACHER)
share = data["where"].sum() / (data["student"] > 0).sum()
print(f"{share:.0%} of the student's positions are shared")
torch.manual_seed(0)
teacher = Model(256, 32)
train(teacher, data, lambda model, batch: next_token(model, batch["teacher"]), steps=200)
print(f"teacher: {bits_per_byte(teacher, held_back['teacher'], TEST):.2f} bits a byte of the test lines")
WAYS = {
    "cross-entropy": lambda model, batch: next_token(model, batch["student"]),
    "cross-entropy and ULD": lambda model, batch: next_token(model, batch["student"]) + universal(model, batch),
    "ULD alone": universal,
}
losses, bits = {}, {}
for name, objective in WAYS.items():
    torch.manual_seed(1)
    student = Model(128, 16)
    before = bits_per_byte(student, held_back["student"], TEST)
    losses[name] = train(student, data, objective)
    bits[name] = before, bits_per_byte(student, held_back["student"], TEST)
    first, last = losses[name][0], losses[name][-1]
    print(f"{name}: loss {first:.2f} -> {last:.2f}, bits a byte of the test lines {before:.2f} -> {bits[name][1]:.2f}")

# the limit of this loss: a teacher with shuffled tokens gives the same value
logits = torch.randn(4, 128)
shuffled = logits[:, torch.randperm(128)]
blind = uld_loss(logits, shuffled).item()
print(f"the loss between logits and the same ones shuffled is {blind:.0f}")
