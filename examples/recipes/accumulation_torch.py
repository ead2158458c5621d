"""Gradient accumulation in PyTorch: a batch in four parts that gives the gradient of the whole batch.

    python examples/recipes/accumulation_torch.py

If the masks of the parts differ, the mean of their means is not the mean of the batch: add sums and divide once. A loss that
compares the examples of a batch with each other is not a sum over parts: it needs the logits of the whole batch, but
nothing else.
"""

import torch
from _digits import batches, teacher
from torch import nn

from kdtorch import euclidean_mse_loss, kl_loss

torch.manual_seed(0)
taught = teacher("torch").eval()
student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)


def parts(*batch):
    return zip(*(x.chunk(4) for x in batch), strict=True)


def means(loss, images, teacher_logits, where):
    """The obvious way: right only if all parts keep equally many examples and the loss does not compare examples."""
    for x, t, kept in parts(images, teacher_logits, where):
        (loss(student(x), t, where=kept) / 4).backward()


def sums(loss, images, teacher_logits, where):
    """Right for losses of single examples. A loss with a state gets `update=False` in all parts but the last."""
    for x, t, kept in parts(images, teacher_logits, where):
        (loss(student(x), t, where=kept, reduction="sum") / where.sum()).backward()


def by_logits(loss, images, teacher_logits, where):
    """Right for every loss: the gradient for the logits of the whole batch is backpropagated in parts.

    The student runs twice and must give the same outputs both times, so without dropout. A state is updated once, by
    the whole batch.
    """
    with torch.no_grad():
        logits = torch.cat([student(x) for (x,) in parts(images)]).requires_grad_()
    value = loss(logits, teacher_logits, where=where)
    value.backward()
    for x, gradient in parts(images, logits.grad):
        student(x).backward(gradient)
    return value.item()


def mixture(*logits, where):
    return kl_loss(*logits, temperature=4.0, where=where) + euclidean_mse_loss(*logits, where=where)


losses = []
for images, _labels in batches(steps=60):
    images, where = torch.from_numpy(images), torch.arange(64) >= 8  # the first part keeps 8 examples, the others 16
    with torch.no_grad():
        teacher_logits = taught(images).logits
    optimizer.zero_grad()
    losses.append(by_logits(mixture, images, teacher_logits, where))
    optimizer.step()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, each step in four parts")


def gradient(way, loss):
    optimizer.zero_grad()
    way(loss, images, teacher_logits, where)
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def whole(loss, images, teacher_logits, where):
    loss(student(images), teacher_logits, where=where).backward()


off = {}
for loss in (kl_loss, euclidean_mse_loss):
    right = gradient(whole, loss)
    for way in (means, sums, by_logits):
        off[loss, way] = ((gradient(way, loss) - right).norm() / right.norm()).item()
        print(f"{loss.__name__} {way.__name__}: the gradient is off by {off[loss, way]:.0e} of its length")
