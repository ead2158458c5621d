"""A teacher behind a serving engine, for a student in PyTorch: its likeliest tokens are recorded once and read in each epoch.

    python examples/recipes/served_torch.py

The engine returns the log-probabilities of 16 out of 128 tokens. Two writers record them without padding, as two ranks
would. `read` pads the sequences of a batch, and `topk_kl_loss` compares the 16 tokens and the rest.
"""

import tempfile

import numpy as np
import torch
from _served import BATCH, HELD_OUT, LEARNED, batches, teacher, tokens
from _text import BYTES
from torch import nn

from kdtorch import kl_loss, topk_kl_loss
from kdtorch.teacher_cache import TeacherCache, record_teacher


class Student(nn.Module):
    """The logits of the next byte, from the last two bytes."""

    def __init__(self):
        super().__init__()
        self.last, self.before = nn.Embedding(BYTES, 64), nn.Embedding(BYTES, 64)
        self.out = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, BYTES))

    def forward(self, x):
        before = nn.functional.pad(x, (1, 0))[:, :-1]
        return self.out(torch.cat([self.last(x), self.before(before)], -1))


torch.manual_seed(0)
student = Student()
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
x = torch.from_numpy(tokens(HELD_OUT, np.arange(len(HELD_OUT))))
where = torch.arange(x.shape[1]) < torch.tensor([[len(line) - 1] for line in HELD_OUT])
everything = torch.from_numpy(np.concatenate([teacher(line) for line in HELD_OUT])).float()


@torch.no_grad()
def divergence():
    """The KL divergence to the teacher's whole distribution, on lines that were not recorded."""
    return kl_loss(student(x)[where], everything).item()


divergences, losses = [divergence()], []
with tempfile.TemporaryDirectory() as folder:
    for rank in range(2):  # usually separate processes, each with a share of the lines
        record_teacher(folder, batches(rank, 2), num_classes=BYTES, part=rank, parts=2)
    cache = TeacherCache(folder, num_classes=BYTES)
    print(f"{len(cache)} lines, {cache.lengths.sum()} tokens")
    draw = np.random.default_rng(0)
    for _ in range(200):
        index = draw.choice(len(LEARNED), BATCH, replace=False)
        taught = cache.read(index, temperature=1.0)  # [batch, length of the longest, ...]
        logits = student(torch.from_numpy(tokens(LEARNED, index)))[:, : taught["where"].shape[1]]
        loss = topk_kl_loss(logits, taught["values"], taught["indices"], taught["rest"], where=taught["where"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
divergences.append(divergence())
print(f"loss {losses[0]:.2f} -> {np.mean(losses[-5:]):.2f}")
print(f"KL to the whole teacher on other lines {divergences[0]:.2f} -> {divergences[1]:.2f}")
