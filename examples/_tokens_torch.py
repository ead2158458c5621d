"""The PyTorch half of `tokens.py`: `torch.nn` and `torch.optim`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdtorch import jsd_loss, kl_loss, linear_kl_loss, reverse_kl_loss, sampled_kl_loss, topk_kl_loss
from kdtorch.interop import load, save
from kdtorch.teacher_cache import TeacherCache, record_teacher

if TYPE_CHECKING:
    from tokens import Loss, Plan, Setting, Size

Memory = list[tuple[Tensor, Tensor]]  # the keys and values of each layer, [batch, heads, positions, width / heads]


class Layer(nn.Module):
    """Causal attention and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.into(self.norm1(x)).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh")), (k, v)


class Model(nn.Module):
    """A transformer over bytes, for the teacher and, smaller, for the student; `head` maps hidden states to logits."""

    def __init__(self, size: Size, length: int, classes: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(classes, size.width), nn.Embedding(length, size.width)
        self.layers = nn.ModuleList([Layer(size.width, size.heads) for _ in range(size.layers)])
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, classes, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                bound = (3 / part.weight.shape[1]) ** 0.5  # variance 1 / width
                nn.init.uniform_(part.weight, -bound, bound)

    def forward(self, tokens: Tensor, past: Memory | None = None) -> tuple[Tensor, Memory]:
        """The hidden states of tokens, or of one more token after those whose keys and values are in `past`."""
        first = past[0][0].shape[2] if past else 0
        x = self.bytes(tokens) + self.places.weight[first : first + tokens.shape[1]]
        memory = []
        for i, layer in enumerate(self.layers):
            x, pair = layer(x, past[i] if past else None)
            memory.append(pair)
        return self.norm(x), memory


class Text(NamedTuple):
    """Sequences of a batch, with the teacher's hidden states and, if they were recorded, its largest logits."""

    tokens: Tensor  # [batch, length + 1], from the 0 before the first byte
    where: Tensor  # [batch, length], True at the bytes that count
    hidden: Tensor  # [batch, length, width of the teacher]
    values: Tensor | None = None  # [batch, length, top_k]
    indices: Tensor | None = None
    rest: Tensor | None = None  # [batch, length]

    def parts(self, number: int) -> list[Text]:
        columns = [[None] * number if x is None else x.chunk(number) for x in self]
        return [Text(*rows) for rows in zip(*columns, strict=True)]


# --8<-- [start:losses]
class Reading:
    """A text, and the student's outputs for it."""

    def __init__(self, student: Model, head: Tensor, text: Text) -> None:
        self.text, self.targets, self.teacher_head = text, text.tokens[:, 1:], head
        self.hidden, _ = student(text.tokens[:, :-1])
        self.head = student.head.weight
        self.logits = self.hidden @ self.head.T
        self.sum: dict[str, Any] = {"where": text.where, "reduction": "sum"}

    @property
    def teacher_logits(self) -> Tensor:
        return self.text.hidden @ self.teacher_head.T

    def log_probs(self, logits: Tensor) -> Tensor:
        """The log-probabilities of the actual next bytes."""
        return logits.log_softmax(-1).gather(-1, self.targets[..., None])[..., 0]

    def cross_entropy(self) -> Tensor:
        return -self.log_probs(self.logits)[self.text.where].sum()


LOSSES: dict[str, Callable[[Reading], Tensor]] = {
    "kl": lambda r: kl_loss(r.logits, r.teacher_logits, **r.sum),
    "kl_t2": lambda r: kl_loss(r.logits, r.teacher_logits, temperature=2.0, **r.sum),
    "reverse_kl": lambda r: reverse_kl_loss(r.logits, r.teacher_logits, **r.sum),
    "jsd": lambda r: jsd_loss(r.logits, r.teacher_logits, **r.sum),
    "linear": lambda r: linear_kl_loss(r.hidden, r.head, r.text.hidden, r.teacher_head, **r.sum),
    "topk": lambda r: topk_kl_loss(r.logits, r.text.values, r.text.indices, r.text.rest, **r.sum),
    "gkd": lambda r: jsd_loss(r.logits, r.teacher_logits, **r.sum),
    "sampled": lambda r: sampled_kl_loss(r.log_probs(r.logits), r.log_probs(r.teacher_logits), **r.sum),
}


def objective(
    student: Model, head: Tensor, losses: Mapping[str, Loss], real: Text, own: Text | None, totals: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of real text plus the weighted losses, and the cross-entropy alone.

    They are sums over the bytes of these sequences, divided by the number of bytes in the whole batch, which may have
    more sequences.
    """
    reading = Reading(student, head, real)
    writing = None if own is None else Reading(student, head, own)
    entropy = reading.cross_entropy() / totals[0]
    loss = entropy
    for name, term in losses.items():
        if writing is not None and term.texts != "real":
            loss = loss + term.weight * LOSSES[name](writing) / totals[1]
        elif term.texts != "own":
            loss = loss + term.weight * LOSSES[name](reading) / totals[0]
    return loss, entropy


# --8<-- [end:losses]
def kept(tokens: Tensor) -> Tensor:
    """True at every byte after the initial 0 and at the 0 that ends the text, False after that."""
    end = (tokens[:, 1:] == 0).long()
    return end.cumsum(1) == end


@torch.no_grad()
def write(student: Model, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Texts continued by the student, with one byte drawn from its distribution for each number in `noise`.

    The mask that is returned keeps only these bytes.
    """
    given = tokens.shape[1]
    _, memory = student(tokens[:, :-1])
    for u in noise.T:
        hidden, memory = student(tokens[:, -1:], memory)
        odds = student.head(hidden[:, -1]).softmax(-1).cumsum(-1)
        drawn = (odds < u[:, None] * odds[:, -1:]).sum(-1, keepdim=True)
        tokens = torch.cat([tokens, drawn], 1)
    return tokens, kept(tokens) & (torch.arange(tokens.shape[1] - 1) >= given - 1)


class Lessons(NamedTuple):
    """The training text with the teacher's outputs for it, and the teacher itself, for the student's own texts."""

    teacher: Model
    tokens: Tensor
    hidden: Tensor
    cache: TeacherCache

    def real(self, index: Tensor, recorded: bool) -> Text:
        tokens, hidden = self.tokens[index], self.hidden[index]
        if not recorded:
            return Text(tokens, kept(tokens), hidden)
        top = self.cache.read(index, temperature=1.0)
        values, rest = (x.to(hidden.dtype) for x in (top["values"], top["rest"]["1.0"]))
        return Text(tokens, kept(tokens), hidden, values, top["indices"], rest)

    @torch.no_grad()
    def own(self, student: Model, prompts: Tensor, noise: Tensor) -> Text:
        """The prompts as the student continues them."""
        tokens, where = write(student, prompts, noise)
        return Text(tokens, where, self.teacher(tokens[:, :-1])[0])


@torch.no_grad()
def listen(teacher: Model, tokens: np.ndarray, setting: Setting, folder: Path, dtype: str = "float32") -> Lessons:
    """Run the teacher on texts; its largest logits are recorded on disk."""
    teacher = teacher.to(getattr(torch, dtype)).eval()
    text, hidden = torch.as_tensor(tokens).long(), []

    def batches() -> Iterator[dict[str, Tensor]]:
        for index in torch.arange(len(text)).split(setting.batch):
            hidden.append(teacher(text[index, :-1])[0])
            yield {"index": index, "logits": teacher.head(hidden[-1])}

    cache = record_teacher(folder, batches(), top_k=setting.top_k)
    return Lessons(teacher, text, torch.cat(hidden), cache)


def fit(model: Model, gradients: Callable[[int], tuple[Tensor, Tensor]], rates: np.ndarray) -> dict[str, Any]:
    """Train with Adam; `gradients` runs the backward pass of a step, and returns the loss and the cross-entropy."""
    optimiser = torch.optim.Adam(model.parameters(), 1.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: rates[min(i, len(rates) - 1)])
    values, start = [], time.perf_counter()
    for i in range(len(rates)):
        optimiser.zero_grad()
        values.append([float(x) for x in gradients(i)])
        optimiser.step()
        schedule.step()
    losses, entropies = np.array(values).T
    return {"losses": losses, "entropies": entropies, "seconds": time.perf_counter() - start}


def train_teacher(
    tokens: np.ndarray, plan: Plan, rates: np.ndarray, setting: Setting, tick: Callable[[], None]
) -> Model:
    """A teacher trained to predict the next byte."""
    torch.manual_seed(0)
    teacher, text = Model(setting.teacher, setting.length, setting.classes), torch.as_tensor(tokens).long()

    def gradients(i: int) -> tuple[Tensor, Tensor]:
        tick()
        batch = text[plan.index[i]]
        where = kept(batch)
        logits = teacher.head(teacher(batch[:, :-1])[0])
        loss = functional.cross_entropy(logits[where], batch[:, 1:][where])
        loss.backward()
        return loss.detach(), loss.detach()

    fit(teacher, gradients, rates)
    return teacher


def new_student(setting: Setting, seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(setting.student, setting.length, setting.classes)


def load_teacher(file: Path, setting: Setting) -> Model:
    teacher = Model(setting.teacher, setting.length, setting.classes)
    teacher.load_state_dict(load(file))
    return teacher


def train_students(
    losses: Mapping[str, Loss],
    lessons: Lessons,
    plans: Sequence[Plan],
    rates: np.ndarray,
    setting: Setting,
    tick: Callable[[], None],
    start: Path | None = None,
    parts: int = 1,
) -> list[dict[str, Any]]:
    """Train one student per plan; returns it with its losses, cross-entropies and time. A batch is split in `parts`."""
    writes = any(term.texts != "real" for term in losses.values())
    head = lessons.teacher.head.weight.detach()

    def train(student: Model, plan: Plan) -> dict[str, Any]:
        index, noise = torch.as_tensor(plan.index).long(), torch.as_tensor(plan.noise).to(head.dtype)

        def gradients(i: int) -> tuple[Tensor, Tensor]:
            tick()
            real, own = lessons.real(index[i], "topk" in losses), None
            if writes and plan.on_policy[i]:
                prompts = lessons.tokens[index[i, : setting.written], : setting.prompt + 1]
                own = lessons.own(student, prompts, noise[i])
            totals = [text.where.sum() for text in (real, own) if text is not None]
            value = entropy = torch.zeros((), dtype=head.dtype)
            for some, written in zip(real.parts(parts), own.parts(parts) if own else [None] * parts, strict=True):
                loss, part = objective(student, head, losses, some, written, totals)
                loss.backward()
                value, entropy = value + loss.detach(), entropy + part.detach()
            return value, entropy

        return fit(student, gradients, rates)

    runs = []
    for seed, plan in enumerate(plans):
        student = new_student(setting, seed)
        if start:
            student.load_state_dict(load(start))
        runs.append({"student": student, **train(student.to(head.dtype), plan)})
    return runs


@torch.no_grad()
def perplexity(model: Model, tokens: np.ndarray) -> float:
    """The perplexity of a byte."""
    text = torch.as_tensor(tokens).long()
    where = kept(text)
    logits = model.head(model(text[:, :-1])[0])
    return float(functional.cross_entropy(logits[where], text[:, 1:][where]).exp())


def count(model: Model) -> int:
    return sum(x.numel() for x in model.parameters())


__all__ = ["count", "listen", "load_teacher", "new_student", "perplexity", "save", "train_students", "train_teacher"]
