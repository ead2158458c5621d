import torch
from torch import Tensor
from torch.nn import functional

from kdtorch import CRDState


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    index: Tensor,
    negatives: Tensor,
    state: CRDState,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> tuple[Tensor, CRDState]:
    embeddings = [functional.normalize(x) for x in (student, teacher)]
    places = torch.cat([index[:, None], negatives], 1)
    losses, normalizers, memories = [], [], []
    sides = (
        (embeddings[0], state.teacher_memory, state.student_normalizer),
        (embeddings[1], state.student_memory, state.teacher_normalizer),
    )
    for embedding, bank, normalizer in sides:
        remembered = bank.index_select(0, places.flatten()).view(*places.shape, -1)
        weight = (torch.bmm(remembered, embedding[..., None].to(bank.dtype))[..., 0] / temperature).exp()
        if normalizer == 0:
            normalizer = weight.detach().mean() * len(bank)
        x, noise = weight / normalizer, negatives.shape[1] / len(bank)
        positive = (x[:, 0] / (x[:, 0] + noise + 1e-7)).log()
        negative = (noise / (x[:, 1:] + noise + 1e-7)).log().sum(-1)
        losses.append(-(positive + negative).mean())
        normalizers.append(normalizer)
    for embedding, bank in zip(embeddings, (state.student_memory, state.teacher_memory), strict=True):
        new = functional.normalize(momentum * bank[index] + (1 - momentum) * embedding.detach())
        memories.append(bank.index_copy(0, index, new))
    return losses[0] + losses[1], CRDState(*memories, *normalizers)
