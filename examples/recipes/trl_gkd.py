"""TRL's `GKDTrainer` with the divergence of this library instead of its own.

    python examples/recipes/trl_gkd.py

Half of the batches are texts that the student samples. Both trainers take the same steps; the memory of each loss is
measured with a larger vocabulary. The models are Llamas with random weights, and the teacher is trained on the text
first.
"""

import copy
import tempfile

import torch
from _llama import PROMPT, TRAIN, llama, peak, teacher, tokenizer
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdtorch import jsd_loss


class Distillation(GKDTrainer):
    @staticmethod
    def generalized_jsd_loss(
        student_logits, teacher_logits, labels, beta=0.5, temperature=1.0, num_items_in_batch=None
    ):
        """The arrays are already shifted. `num_items_in_batch` counts the tokens of all parts of the batch."""
        options = {"beta": beta, "temperature": temperature, "where": labels != -100}
        if num_items_in_batch is None:
            return jsd_loss(student_logits, teacher_logits, **options)
        return jsd_loss(student_logits, teacher_logits, **options, reduction="sum") / num_items_in_batch


def message(text):
    return [{"role": "user", "content": text[:PROMPT]}, {"role": "assistant", "content": text[PROMPT:]}]


def train(kind, student):
    """Train; returns the loss of each step, with the same data and the same random numbers."""
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            folder,
            lmbda=0.5,  # the fraction of batches that the student writes itself
            beta=0.5,
            max_new_tokens=16,
            max_length=48,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=20,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
        )
        data = Dataset.from_list([{"messages": message(text)} for text in TRAIN[:400]])
        trainer = kind(student, teacher(), settings, train_dataset=data, processing_class=tokenizer())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


torch.manual_seed(1)
student = llama(32, 1)
students = {kind: copy.deepcopy(student) for kind in (GKDTrainer, Distillation)}
losses = {kind.__name__: train(kind, model) for kind, model in students.items()}
theirs, ours = (torch.tensor(losses[kind.__name__]) for kind in students)
off = ((ours - theirs).abs() / theirs).max().item()
print(f"loss {ours[0]:.3f} -> {ours[-1]:.3f}, off by {off:.0e} from TRL's at most")

# 512 tokens of a vocabulary of 32,000: each model's logits are 62.5 MiB
student_logits, teacher_logits = torch.randn(2, 4, 128, 32_000)
labels = torch.randint(32_000, (4, 128))
values, held = {}, {}
for kind in students:

    def step(kind=kind):
        learned = student_logits.detach().requires_grad_()
        loss = kind.generalized_jsd_loss(learned, teacher_logits, labels, beta=0.5)
        loss.backward()
        values[kind.__name__] = loss.item(), learned.grad

    held[kind.__name__] = peak(step)
    print(f"{kind.__name__}.generalized_jsd_loss holds {held[kind.__name__]:.0f} MiB beyond the logits")
