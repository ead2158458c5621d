"""Mixed precision in PyTorch: the networks under `torch.autocast` in bfloat16, the loss in float32.

    python examples/recipes/bfloat16_torch.py

A loss computes in float32 for any input dtype, and its gradient has the dtype of the logits.
"""

import torch
from _digits import teacher, test, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdtorch import dkd_loss

torch.manual_seed(0)
taught = teacher("torch").eval()
student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)  # the weights stay float32
loader = DataLoader(TensorDataset(*map(torch.from_numpy, train())), batch_size=64, shuffle=True)


def objective(logits, teacher_logits, labels):
    soft = dkd_loss(logits, teacher_logits, labels, alpha=1.0, beta=2.0, temperature=2.0)
    return nn.functional.cross_entropy(logits, labels) + soft


losses = []
for _epoch in range(6):
    for images, labels in loader:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # "cuda" on a GPU
            with torch.no_grad():
                teacher_logits = taught(images).logits
            logits = student(images)
            loss = objective(logits, teacher_logits, labels)  # the same number inside and outside autocast
        optimizer.zero_grad()
        loss.backward()  # bfloat16 has the range of float32, so no GradScaler is needed, as it would be for float16
        optimizer.step()
        losses.append(loss.item())

wide = objective(logits.float(), teacher_logits.float(), labels)  # the same logits, made float32 by hand
images, labels = map(torch.from_numpy, test())
with torch.no_grad():
    accuracy = (student(images).argmax(1) == labels).float().mean().item()
print(f"logits {logits.dtype}, loss {loss.dtype}, weights {student[1].weight.dtype}")
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {accuracy:.1%} of the test images")
