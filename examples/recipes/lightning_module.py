"""Distillation in PyTorch Lightning: the loss in `training_step`, and a teacher that the optimiser does not train.

    python examples/recipes/lightning_module.py

The teacher is part of the module, so it is moved to the device with it, and is saved in its checkpoints.
"""

import pytorch_lightning as pl
import torch
from _digits import teacher, test, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdtorch import dkd_loss


class Distillation(pl.LightningModule):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)  # it stays so; Lightning mentions it once
        self.losses: list[float] = []

    def training_step(self, batch, index):
        images, labels = batch
        logits = self.student(images)
        hard = nn.functional.cross_entropy(logits, labels)
        soft = dkd_loss(logits, self.teacher(images).logits, labels, alpha=1.0, beta=2.0, temperature=2.0)
        self.log_dict({"hard": hard, "soft": soft})  # for the Trainer's logger, if it has one
        self.losses.append((hard + soft).item())
        return hard + soft

    def test_step(self, batch, index):
        images, labels = batch
        self.log("accuracy", (self.student(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)


pl.seed_everything(0, verbose=False)
student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
module = Distillation(student, teacher("torch"))
trainer = pl.Trainer(
    max_epochs=6,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(TensorDataset(*map(torch.from_numpy, train())), batch_size=64, shuffle=True))
(result,) = trainer.test(module, DataLoader(TensorDataset(*map(torch.from_numpy, test())), 500), verbose=False)
losses = module.losses
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {result['accuracy']:.1%} of the test images")
