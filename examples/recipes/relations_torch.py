"""Relations in PyTorch: a teacher whose features are wider than the student's.

    python examples/recipes/relations_torch.py

CRD stores an embedding of every image of the data set, so it needs each image's position in the data set.
"""

import numpy as np
import torch
from _digits import teacher, test, train
from torch import nn
from torch.nn import functional

import kdtorch
from kdtorch.nn import CRDLoss

torch.manual_seed(0)
images, labels = map(torch.from_numpy, train())
wide = teacher("torch").eval()  # a small CNN trained on the digits
with torch.no_grad():
    taught = wide(images).embedding  # [1000, 64]
crd = CRDLoss(32, 64, 16, num_data=len(images), num_negatives=128)
# functions of the student's features (32 wide), the teacher's, and the images' indices in the data set
RELATIONS = {
    "crd": lambda student, teacher, index: 0.1 * crd(student, teacher, index),
    "rkd": lambda student, teacher, index: 0.1 * kdtorch.rkd_loss(student, teacher),
    "similarity": lambda student, teacher, index: 100 * kdtorch.similarity_loss(student, teacher),
}

results = {}
for name, relation in RELATIONS.items():
    body, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10)
    parameters = [*body.parameters(), *head.parameters(), *crd.parameters()]
    optimizer, draw, losses = torch.optim.Adam(parameters, lr=1e-2), np.random.default_rng(0), []
    for _ in range(150):
        index = torch.from_numpy(draw.choice(len(images), 64, replace=False))
        features = body(images[index])
        told = relation(features, taught[index], index)
        loss = functional.cross_entropy(head(features), labels[index]) + told
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(told.item())
    with torch.no_grad():
        right = head(body(torch.from_numpy(test()[0]))).argmax(1) == torch.from_numpy(test()[1])
    results[name] = losses, right.float().mean().item()
    print(
        f"{name} {losses[0]:.3f} -> {losses[-1]:.3f}; the student is right on {results[name][1]:.1%} of the test images"
    )
