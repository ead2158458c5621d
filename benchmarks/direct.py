"""Each loss as its formula is written, in eager PyTorch: the baseline of the benchmarks, not a thing to use.

The arrays that a formula names are built, the loops that it writes are run. Arguments and results are those of the
function of the same name in kdtorch, without masks and reductions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdtorch import CRCDState, DINOState


def _kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    log_p, q = functional.log_softmax(student_logits, -1), functional.softmax(teacher_logits, -1)
    return functional.kl_div(log_p, q, reduction="none").sum(-1)


def kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return temperature**2 * _kl(teacher / temperature, student / temperature).mean()


def symmetric_kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    s, t = student / temperature, teacher / temperature
    return temperature**2 * (_kl(t, s) + _kl(s, t)).mean() / 2


def difference_kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    differences = [(x[:, None] - x[None]) / temperature for x in (student, teacher)]
    return temperature**2 * _kl(differences[1], differences[0]).mean()


def dkd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    s, t = student / temperature, teacher / temperature
    label = functional.one_hot(labels, s.shape[-1])
    p_y, q_y = ((functional.softmax(x, -1) * label).sum(-1) for x in (s, t))
    p_rest, q_rest = ((functional.softmax(x, -1) * (1 - label)).sum(-1) for x in (s, t))
    p, q = torch.stack([p_y, p_rest], -1), torch.stack([q_y, q_rest], -1)
    target = functional.kl_div(p.log(), q, reduction="none").sum(-1)
    others = _kl(t - 1000.0 * label, s - 1000.0 * label)
    return temperature**2 * (alpha * target + beta * others).mean()


def nkd_loss(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0) -> Tensor:
    number, classes = student.shape
    log_p, q = functional.log_softmax(student, -1), functional.softmax(teacher, -1)
    target = -q.gather(1, labels[:, None]) * log_p.gather(1, labels[:, None])
    rest = torch.ones_like(student).scatter(1, labels[:, None], 0).bool()
    s, t = (x[rest].reshape(number, classes - 1) / temperature for x in (student, teacher))
    others = -(functional.softmax(t, -1) * functional.log_softmax(s, -1)).sum(-1)
    return target.mean() + gamma * temperature**2 * others.mean()


def uskd_loss(
    student: Tensor, weak: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005
) -> Tensor:
    number, classes = student.shape
    label = labels[:, None]
    p, log_p = functional.softmax(student, -1), functional.log_softmax(student, -1)
    w, log_w = functional.softmax(weak, -1), functional.log_softmax(weak, -1)
    square = p.gather(1, label) ** 2
    soft = (1 + square - square.mean(0, keepdim=True)).detach()
    target = -(soft * log_p.gather(1, label)).mean()
    rest = torch.ones_like(student).scatter(1, label, 0).bool()
    score = w / (1 - w.gather(1, label) + 1e-6) + log_p / (1 - log_p.gather(1, label) + 1e-6)
    places = score.detach().sort(dim=-1, descending=True, stable=True).indices
    zipf = (1 / torch.arange(1, classes + 1, dtype=student.dtype)).expand(number, -1)
    zipf = torch.zeros_like(student).scatter(1, places, zipf)[rest].reshape(number, -1)
    zipf = zipf / zipf.sum(-1, keepdim=True)
    others = -(zipf * functional.log_softmax(student[rest].reshape(number, -1), -1)).sum(-1).mean()
    smooth = torch.full_like(weak, 0.1 / classes).scatter(1, label, 0.9 + 0.1 / classes)
    return alpha * target + beta * others - mu * (smooth * log_w).sum(-1).mean()


def topk_kl_loss(student: Tensor, values: Tensor, indices: Tensor, rest: Tensor, temperature: float = 1.0) -> Tensor:
    s, t = student / temperature, torch.cat([values, rest[..., None]], -1) / temperature
    others = s.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return temperature**2 * _kl(t, torch.cat([s.gather(-1, indices), others[..., None]], -1)).mean()


def euclidean_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    distances = []
    for x in (student, teacher):
        x = functional.normalize(x)
        square = x.square().sum(1)
        square = square[:, None] + square[None] - 2 * x @ x.T
        distances.append(square.clamp(min=1e-12).sqrt())
    return functional.mse_loss(*distances)


def dcn_loss(student: Tensor, teacher: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    total = student.new_zeros(())
    for s, t, y in zip(student, teacher, labels, strict=True):
        center = centers[y]
        total = total + 1 - s @ (center / center.norm()) / torch.maximum(s.norm(), t.norm())
    return total / len(student)


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    state: DINOState,
    teacher_temperature: float = 0.04,
    student_temperature: float = 0.1,
    center_momentum: float = 0.9,
) -> tuple[Tensor, DINOState]:
    total, pairs = student.new_zeros(()), 0
    targets = functional.softmax((teacher - state.center) / teacher_temperature, -1)
    for u, q in enumerate(targets):
        for v, view in enumerate(student / student_temperature):
            if u != v:
                total = total - (q * functional.log_softmax(view, -1)).sum(-1).mean()
                pairs += 1
    center = center_momentum * state.center + (1 - center_momentum) * teacher.mean((0, 1))
    return total / pairs, DINOState(center)


def crcd_loss(
    student: Tensor,
    teacher: Tensor,
    index: Tensor,
    negatives: Tensor,
    state: CRCDState,
    temperature: float = 0.05,
    momentum: float = 0.5,
) -> tuple[Tensor, CRCDState]:
    embeddings = [functional.normalize(x) for x in (student, teacher)]
    places = torch.cat([index[:, None], negatives], 1)
    losses, normalizers, memories = [], [], []
    sides = (
        (embeddings[0], state.teacher_memory, state.student_normalizer),
        (embeddings[1], state.student_memory, state.teacher_normalizer),
    )
    for embedding, bank, normalizer in sides:
        anchors, remembered = bank[index], bank[places]
        rho = functional.normalize(embedding[:, None] - anchors[None] + 1e-6, dim=-1)
        relations = functional.normalize(remembered[:, None] - anchors[None, :, None] + 1e-6, dim=-1)
        weight = ((relations * rho[:, :, None]).sum(-1) / temperature).exp()
        if normalizer == 0:
            normalizer = weight.detach().mean() * len(bank)
        x, noise = weight / normalizer, negatives.shape[1] / len(bank)
        positive = (x[..., 0] / (x[..., 0] + noise + 1e-7)).log()
        negative = (noise / (x[..., 1:] + noise + 1e-7)).log().sum(-1)
        losses.append(-(positive + negative).mean())
        normalizers.append(normalizer)
    for embedding, bank in zip(embeddings, (state.student_memory, state.teacher_memory), strict=True):
        new = functional.normalize(momentum * bank[index] + (1 - momentum) * embedding.detach())
        memories.append(bank.index_copy(0, index, new))
    return losses[0] + losses[1], CRCDState(*memories, *normalizers)


def hcl_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    total = student[0].new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        loss, weight, weights = functional.mse_loss(s, t), 1.0, 1.0
        for size in (4, 2, 1):
            if size < s.shape[2]:
                weight /= 2
                weights += weight
                pooled = [functional.adaptive_avg_pool2d(x, size) for x in (s, t)]
                loss = loss + weight * functional.mse_loss(*pooled)
        total = total + loss / weights
    return total
