"""A language model distilled in PyTorch Lightning from recorded outputs of its teacher, read in batches.

    python examples/recipes/lightning_cache.py

The teacher's 16 largest logits for each token are recorded in a `TeacherCache` before the training, which then runs
without the teacher. A batch is processed in parts, and the loss of each part is divided by the tokens of all parts.
"""

import tempfile
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from _text import BYTES, LINES, batches, rows
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from kdtorch import topk_kl_loss
from kdtorch.interop import TeacherCache, record_teacher

T = 2.0
TOKENS = torch.from_numpy(rows(range(len(LINES))))
TRAIN, TEST = range(512), range(512, 768)


class Model(nn.Module):
    """The logits of the next byte, by a recurrent network."""

    def __init__(self, width):
        super().__init__()
        self.tokens, self.past, self.logits = nn.Embedding(BYTES, width), nn.GRU(width, width), nn.Linear(width, BYTES)

    def forward(self, tokens):
        return self.logits(self.past(self.tokens(tokens).transpose(0, 1))[0].transpose(0, 1))


def next_byte(logits, tokens, reduction="mean"):
    return functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=0, reduction=reduction)


def learned(width, steps):
    """A model trained on the text."""
    model = Model(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for tokens in map(torch.from_numpy, batches(steps)):
        optimizer.zero_grad()
        next_byte(model(tokens[:, :-1]), tokens).backward()
        optimizer.step()
    return model.eval()


def record(folder, teacher):
    """Run the teacher over the training set once; a second call continues where the first one stopped."""
    with torch.inference_mode():
        given = torch.tensor(TRAIN).split(128)
        said = ({"index": index, "logits": teacher(TOKENS[index, :-1])} for index in given)
        return record_teacher(folder, said, top_k=16, temperatures=[T])


def read(cache, parts, index):
    """A batch in parts, from the indices of the sampler; the worker reads the cache once for each part."""
    split = torch.tensor(index).chunk(parts)
    return [{"tokens": TOKENS[x], "teacher": cache.read(x, temperature=T)} for x in split]


class Distillation(pl.LightningModule):
    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.automatic_optimization = False  # Lightning would divide by the number of parts, not of tokens
        self.losses: list[float] = []

    def total(self, tokens, teacher):
        """The sum over the tokens of a part."""
        logits = self.student(tokens[:, :-1])  # for the second and later tokens
        entries = teacher["values"], teacher["indices"], teacher["rest"]
        soft = topk_kl_loss(logits, *entries, temperature=T, where=tokens[:, 1:] > 0, reduction="sum")
        return soft + next_byte(logits, tokens, reduction="sum")

    def training_step(self, parts, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        number = sum((part["tokens"][:, 1:] > 0).sum() for part in parts)
        for part in parts:
            loss = self.total(**part) / number
            self.manual_backward(loss)
            self.losses.append(loss.item())
        optimizer.step()

    def test_step(self, tokens, index):
        self.log("next_byte", next_byte(self.student(tokens[:, :-1]), tokens))

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)


def fit(module, cache, parts, epochs):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TRAIN, batch_size=64, shuffle=True, collate_fn=partial(read, cache, parts))
    trainer.fit(module, loader)
    return trainer


PARTS = 4
pl.seed_everything(0, verbose=False)
teacher, student = learned(64, steps=150), Model(24)
with tempfile.TemporaryDirectory() as folder:
    record(folder, teacher)
    module, cache = Distillation(student), TeacherCache(folder, num_classes=BYTES)
    trainer = fit(module, cache, PARTS, epochs=10)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
(result,) = trainer.test(module, DataLoader(TOKENS[TEST], 256), verbose=False)
print(f"the cache holds {size / TOKENS[TRAIN, 1:].numel():.0f} bytes a token")
losses = torch.tensor(module.losses).view(-1, PARTS).sum(1).tolist()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {result['next_byte']:.2f} nats a byte of the test lines")
