"""ReviewKD in PyTorch: the student's feature maps, fused from deep to shallow by connectors, against the teacher's.

    python examples/recipes/reviewkd_torch.py

The connectors are trained with the student and not needed afterwards.
"""

import torch
from _digits import SETTING, teacher, test, train
from _digits_torch import Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdtorch import hcl_loss
from kdtorch.nn import ReviewKD

torch.manual_seed(0)
taught = teacher("torch").eval()  # maps of 8 and 16 channels, [batch, 8, 8, 8] and [batch, 16, 4, 4]
student = Net((4, 6), 20, 10)  # the same two convolutions, narrower: maps of 4 and 6 channels
review = ReviewKD([4, 6], SETTING.teacher[0], mid_channels=8)  # from the student's channels to the teacher's
optimizer = torch.optim.Adam([*student.parameters(), *review.parameters()], lr=1e-2)
loader = DataLoader(TensorDataset(*map(torch.from_numpy, train())), batch_size=64, shuffle=True)

losses = []
for epoch in range(6):
    for images, labels in loader:
        with torch.no_grad():
            theirs = taught(images).maps
        logits, _, ours = student(images)
        hierarchical = hcl_loss(review(ours), theirs)  # equally many maps, of equal shapes; any height and width
        weight = min((epoch + 1) / 3, 1)  # a warm-up, because the connectors start with random weights
        loss = nn.functional.cross_entropy(logits, labels) + weight * hierarchical
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(hierarchical.item())

images, labels = map(torch.from_numpy, test())
with torch.no_grad():
    accuracy = (student(images).logits.argmax(1) == labels).float().mean().item()
print(f"hcl {losses[0]:.3f} -> {losses[-1]:.3f}; the student is right on {accuracy:.1%} of the test images")
