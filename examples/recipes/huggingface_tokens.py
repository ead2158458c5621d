"""A language model distilled in Hugging Face's `Trainer`: shifted labels, a mask, and gradient accumulation.

    python examples/recipes/huggingface_tokens.py

Teacher and student are Llamas with random weights, built from configurations; the teacher is trained on the text first.
"""

import tempfile

import torch
from _llama import TEST, TRAIN, collate, llama, rows, teacher
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from kdtorch import kl_loss, linear_kl_loss


class DistillationTrainer(Trainer):
    # `compute_loss` divides by the tokens of the whole batch, so the Trainer must not divide by the number of its parts
    loss_is_scaled_for_ga = True

    def __init__(self, *args, teacher, **options) -> None:
        super().__init__(*args, data_collator=collate, **options)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = inputs["labels"][:, 1:]  # the logits at a position predict the next token
        kept = targets != -100  # without prompts and padding
        tokens = kept.sum() if num_items_in_batch is None else num_items_in_batch  # None in `evaluate`
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        loss, outputs = self.total(model, ids, targets, kept)
        loss = loss / tokens
        return (loss, outputs) if return_outputs else loss

    def total(self, model, ids, targets, kept):
        """The sum over the kept tokens, from the logits."""
        outputs = model(**ids)
        logits = outputs.logits[:, :-1]
        with torch.no_grad():
            teacher_logits = self.teacher(**ids).logits[:, :-1]
        hard = functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="sum")
        soft = kl_loss(logits, teacher_logits, temperature=2.0, where=kept, reduction="sum")
        return hard + soft, outputs


class HeadDistillationTrainer(DistillationTrainer):
    """Only the soft part, from hidden states and heads, without the logits of the whole batch."""

    def total(self, model, ids, targets, kept):
        outputs = model.model(**ids)
        with torch.no_grad():
            taught = self.teacher.model(**ids).last_hidden_state[:, :-1]
        student = outputs.last_hidden_state[:, :-1], model.lm_head.weight
        options = {"temperature": 2.0, "where": kept, "reduction": "sum"}
        return linear_kl_loss(*student, taught, self.teacher.lm_head.weight, **options), outputs


def arguments(folder, **options):
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "max_steps": 40,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(folder, **settings | options)


results = {}
for kind in (DistillationTrainer, HeadDistillationTrainer):
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(llama(32, 1), arguments(folder), train_dataset=rows(TRAIN), teacher=teacher())
        before = trainer.evaluate(rows(TEST), metric_key_prefix="test")["test_loss"]
        trainer.train()
        after = trainer.evaluate(rows(TEST), metric_key_prefix="test")["test_loss"]
    results[kind.__name__] = before, after
    print(f"{kind.__name__}: loss of the test texts {before:.2f} -> {after:.2f}")
