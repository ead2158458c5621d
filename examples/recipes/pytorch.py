"""Distillation in PyTorch: a plain training loop with a teacher.

    python examples/recipes/pytorch.py

The teacher is called under `no_grad`, and the loss has one more term.
"""

import torch
from _digits import teacher, test, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdtorch import dkd_loss

torch.manual_seed(0)
taught = teacher("torch").eval()  # a small CNN trained on the digits
student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
loader = DataLoader(TensorDataset(*map(torch.from_numpy, train())), batch_size=64, shuffle=True)

losses = []
for _epoch in range(6):
    for images, labels in loader:
        with torch.no_grad():
            teacher_logits = taught(images).logits
        logits = student(images)
        hard = nn.functional.cross_entropy(logits, labels)
        soft = dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=2.0, temperature=2.0)
        loss = hard + soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

images, labels = map(torch.from_numpy, test())
with torch.no_grad():
    accuracy = (student(images).argmax(1) == labels).float().mean().item()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {accuracy:.1%} of the test images")
