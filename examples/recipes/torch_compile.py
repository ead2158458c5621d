"""Distillation under `torch.compile`: the student and the loss as one graph.

    python examples/recipes/torch_compile.py

The losses have no graph breaks. `fullgraph` requires the same of the student.
"""

import torch
from _digits import teacher, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdtorch import dkd_loss

torch.manual_seed(0)
taught = teacher("torch").eval()
student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
# a smaller last batch would have another shape: drop it, or compile once more
loader = DataLoader(TensorDataset(*map(torch.from_numpy, train())), batch_size=64, shuffle=True, drop_last=True)


def objective(images, labels, teacher_logits):
    logits = student(images)
    hard = nn.functional.cross_entropy(logits, labels)
    return hard + dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=2.0, temperature=2.0)


# fullgraph: an error if something cannot be compiled, instead of a slow step that nobody notices
compiled = torch.compile(objective, fullgraph=True)

losses = []
for _epoch in range(6):
    for images, labels in loader:
        with torch.no_grad():
            teacher_logits = taught(images).logits
        loss = compiled(images, labels, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

same = objective(images, labels, teacher_logits).item(), compiled(images, labels, teacher_logits).item()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; at the end eager {same[0]:.6f}, compiled {same[1]:.6f}")
