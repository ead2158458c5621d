"""Several losses from a configuration in PyTorch, each of them logged to TensorBoard.

    python examples/recipes/make_loss_torch.py
    tensorboard --logdir out/tensorboard

`terms` returns each loss by name, and `weigh` their weighted sum, which is minimised.
"""

import torch
from _digits import teacher, test, train
from _digits_torch import Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from kdtorch import make_loss

CONFIG = {
    "MODEL": {
        "METRIC_LOSS_TYPE": "kd-dkd-dcn-eu_mse",
        "KD_LOSS_WEIGHT": [1.0, 5.0, 0.5],
        "KD_LOSS_ARGS": {"dkd": {"beta": 2.0, "temperature": 2.0}},
        "FEAT_DIM": 64,  # width of the embeddings, for the class centres of dcn
    }
}

torch.manual_seed(0)
taught = teacher("torch").eval()
student = Net((4, 6), 64, 10)  # an embedding as wide as the teacher's
kd_loss = make_loss(CONFIG, num_classes=10, num_data=1000)
optimizer = torch.optim.Adam([*student.parameters(), *kd_loss.parameters()], lr=1e-2)  # dcn's centres are learned
loader = DataLoader(TensorDataset(*map(torch.from_numpy, train())), batch_size=64, shuffle=True)

losses = []
with SummaryWriter("out/tensorboard/torch") as writer:
    for _epoch in range(6):
        for images, labels in loader:
            with torch.no_grad():
                theirs = taught(images)
            ours = student(images)
            feat = {"stu": ours.embedding, "tea": theirs.embedding}
            feat |= {"score_stu": ours.logits, "score_tea": theirs.logits}
            terms = kd_loss.terms(feat=feat, target=labels)  # each loss by name, not weighted
            hard = nn.functional.cross_entropy(ours.logits, labels)
            loss = hard + kd_loss.weigh(terms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values = {name: value.item() for name, value in {**terms, "hard": hard, "loss": loss}.items()}
            for name, value in values.items():
                writer.add_scalar(name, value, len(losses))
            losses.append(values)

images, labels = map(torch.from_numpy, test())
with torch.no_grad():
    accuracy = (student(images).logits.argmax(1) == labels).float().mean().item()
print(", ".join(f"{name} {losses[0][name]:.2f} -> {losses[-1][name]:.2f}" for name in losses[0]))
print(f"the student is right on {accuracy:.1%} of the test images; out/tensorboard has the curves")
