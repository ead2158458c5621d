"""A `distill_step` for PyTorch: student, teacher, several losses with their weights, and values to log.

    python examples/recipes/distill_step_torch.py
    tensorboard --logdir out/tensorboard

To add a loss, add a line to `LOSSES`. The step returns a dictionary of numbers, which this example writes to
TensorBoard.
"""

import torch
from _digits import batches, teacher, test
from _digits_torch import Net
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from kdtorch import attention_transfer_loss, dkd_loss, similarity_loss

cross_entropy = nn.functional.cross_entropy
LOSSES = {  # a weight, and a function of the outputs of student and teacher and of the labels
    "hard": (1.0, lambda ours, theirs, labels: cross_entropy(ours.logits, labels)),
    "dkd": (1.0, lambda ours, theirs, labels: dkd_loss(ours.logits, theirs.logits, labels, beta=2.0)),
    "attention": (100.0, lambda ours, theirs, labels: attention_transfer_loss(ours.maps, theirs.maps)),
    "similarity": (1000.0, lambda ours, theirs, labels: similarity_loss(ours.embedding, theirs.embedding)),
}


def distill_step(student, teacher, optimizer, images, labels):
    with torch.no_grad():
        theirs = teacher(images)
    ours = student(images)
    terms = {name: loss(ours, theirs, labels) for name, (_, loss) in LOSSES.items()}
    total = sum(weight * terms[name] for name, (weight, _) in LOSSES.items())
    optimizer.zero_grad()
    total.backward()
    gradient = nn.utils.clip_grad_norm_(student.parameters(), 10.0)  # returns the norm before clipping
    optimizer.step()
    agreement = (ours.logits.argmax(-1) == theirs.logits.argmax(-1)).float().mean()
    logs = {**terms, "total": total, "gradient": gradient, "agreement": agreement}
    return {name: x.detach() for name, x in logs.items()}


torch.manual_seed(0)
student, taught = Net((4, 6), 20, 10), teacher("torch").eval()
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
logs = []
with SummaryWriter("out/tensorboard/distill_step_torch") as writer:
    for number, (images, labels) in enumerate(batches(steps=100)):
        batch = torch.from_numpy(images), torch.from_numpy(labels)
        logs.append({name: x.item() for name, x in distill_step(student, taught, optimizer, *batch).items()})
        for name, value in logs[-1].items():
            writer.add_scalar(name, value, number)

images, labels = map(torch.from_numpy, test())
with torch.no_grad():
    accuracy = (student(images).logits.argmax(-1) == labels).float().mean().item()
for name in logs[0]:
    print(f"{name:10} {logs[0][name]:7.4f} -> {logs[-1][name]:7.4f}")
print(f"the student is right on {accuracy:.1%} of the test images")
