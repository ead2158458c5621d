"""TRL's `DistillationTrainer` with a loss of this library instead of its own, from hidden states and heads.

    python examples/recipes/trl_distillation.py

The student writes all texts, as usual in this trainer. Both losses take the same steps; the memory of each is measured
with a larger vocabulary. The models are Llamas with random weights, and the teacher is trained on the text first.
"""

import copy
import tempfile
from unittest.mock import patch

import torch
from _llama import PROMPT, TRAIN, llama, peak, teacher, tokenizer
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from kdtorch import linear_jsd_loss

theirs = distillation_trainer._chunked_divergence_loss


def ours(
    student_hidden,
    teacher_hidden,
    student_weight,
    teacher_weight,
    completion_mask,
    beta,
    num_items_in_batch=None,
    student_lm_head_bias=None,
    teacher_lm_head_bias=None,
    temperature=1.0,
    **scales,
):
    """The loss, the entropy that TRL logs, and the number of tokens. The hidden states are already shifted."""
    if any(x not in (1.0, None) for x in scales.values()):
        raise NotImplementedError(f"heads that scale or cap their logits: {scales}")
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight, student_lm_head_bias, teacher_lm_head_bias
    where = completion_mask != 0
    tokens = where.sum()
    total = linear_jsd_loss(*heads, beta=beta, temperature=temperature, where=where, memory="least", reduction="sum")
    entropy = torch.tensor(torch.nan)  # not computed; TRL leaves NaN out of its log
    return total / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), entropy, tokens


class Distillation(DistillationTrainer):
    def _compute_loss(self, *args):
        with patch.object(distillation_trainer, "_chunked_divergence_loss", ours):
            return super()._compute_loss(*args)


def train(kind, student):
    """Train; returns the loss of each step, with the same data and the same random numbers."""
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            folder,
            beta=0.5,
            max_completion_length=16,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=12,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
        )
        data = Dataset.from_list([{"prompt": text[:PROMPT]} for text in TRAIN[:400]])
        trainer = kind(student, teacher(), settings, train_dataset=data, processing_class=tokenizer())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


torch.manual_seed(1)
student = llama(32, 1)
losses = {kind.__name__: train(kind, copy.deepcopy(student)) for kind in (DistillationTrainer, Distillation)}
first, second = (torch.tensor(x) for x in losses.values())
off = ((second - first).abs() / first).max().item()
print(f"loss {second[0]:.3f} -> {second[-1]:.3f}, off by {off:.0e} from TRL's at most")

# 512 tokens, 256 wide, and a vocabulary of 32,000: a head is 31 MiB, and so is its gradient; logits would be 62.5 MiB
hidden, teacher_hidden = torch.randn(2, 4, 128, 256)
weight, teacher_weight = torch.randn(2, 32_000, 256) / 16
mask = torch.rand(4, 128) < 0.75
values, held = {}, {}
for name, loss in {"TRL": theirs, "kdtorch": ours}.items():

    def step(name=name, loss=loss):
        learned = [x.detach().requires_grad_() for x in (hidden, weight)]
        value, _, _ = loss(learned[0], teacher_hidden, learned[1], teacher_weight, mask, 0.5)
        value.backward()
        values[name] = value.item(), *(x.grad for x in learned)

    held[name] = peak(step)
    print(f"{name}'s loss from heads holds {held[name]:.0f} MiB, its gradients among them")
