"""Distillation in Hugging Face's `Trainer`: a subclass whose `compute_loss` calls the teacher.

    python examples/recipes/huggingface_trainer.py

The student is a vision transformer with random weights, built from a configuration; nothing is downloaded.
"""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from _digits import teacher, test, train
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from kdtorch import dkd_loss


class DistillationTrainer(Trainer):
    # `compute_loss` returns a mean, so the Trainer must divide it by the number of accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(self, *args, teacher: nn.Module, **options) -> None:
        super().__init__(*args, **options)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)  # with labels, so that `outputs.loss` is the model's own
        with torch.no_grad():
            teacher_logits = self.teacher(inputs["pixel_values"][:, 0]).logits
        soft = dkd_loss(outputs.logits, teacher_logits, inputs["labels"], alpha=1.0, beta=2.0, temperature=2.0)
        loss = outputs.loss + soft
        return (loss, outputs) if return_outputs else loss


def rows(images, labels):
    return [{"pixel_values": image[None], "labels": label} for image, label in zip(images, labels, strict=True)]


torch.manual_seed(0)
shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
student = ViTForImageClassification(ViTConfig(**shape, **size, initializer_range=0.2))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=10,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=250,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DistillationTrainer(
        student,
        arguments,
        train_dataset=rows(*train()),
        compute_metrics=lambda said: {"accuracy": (said.predictions.argmax(-1) == said.label_ids).mean()},
        teacher=teacher("torch"),
    )
    trainer.train()
    result = trainer.evaluate(rows(*test()))

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
accuracy = result["eval_accuracy"]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the student is right on {accuracy:.1%} of the test images")
