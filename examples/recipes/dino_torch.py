"""Self-distillation in PyTorch: DINO, where the teacher is the student's own moving average.

    python examples/recipes/dino_torch.py

20 of 1,000 images have a label. On all images the student predicts, from one view of an image, what its average outputs
for another view. For comparison, three students are trained with this loss and three without it.
"""

import torch
from _digits import test, told, views
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdtorch.nn import DINOLoss


def distil(weight, seed):
    """Train; returns the student, its average, and the loss of each step."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.97)).requires_grad_(False)
    teacher.update_parameters(student)  # the first call copies
    # the centre is a buffer of the loss: save it with the student. With only 10 classes, the published temperatures,
    # 0.04 and 0.1, are too sharp
    dino = DINOLoss(10, warmup_temperature=0.5, teacher_temperature=0.5, student_temperature=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    images, labels = map(torch.from_numpy, told())
    losses = []
    for both in views(steps=200, seed=seed):
        stacked = torch.from_numpy(both).flatten(0, 1)  # [2 * 64, 8, 8]: the first views, then the second
        loss = nn.functional.cross_entropy(student(images), labels)
        loss = loss + weight * dino(student(stacked), teacher(stacked))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)  # after the step: 0.97 of itself and 0.03 of the student
        losses.append(loss.item())
    return student, teacher, losses


@torch.no_grad()
def accuracy(nets):
    images, labels = map(torch.from_numpy, test())
    return sum((net(images).argmax(1) == labels).float().mean().item() for net in nets) / len(nets)


alone, _, _ = zip(*(distil(0.0, seed) for seed in range(3)), strict=True)
students, teachers, losses = zip(*(distil(1.0, seed) for seed in range(3)), strict=True)
accuracies = {"alone": accuracy(alone), "student": accuracy(students), "teacher": accuracy(teachers)}
print(f"loss {losses[0][0]:.2f} -> {losses[0][-1]:.2f}")
print("20 labels alone {alone:.1%}; with DINO {student:.1%}, its average {teacher:.1%}".format(**accuracies))
