"""Shared by the recipes for Hugging Face: a byte-level tokenizer and Llamas with random weights, without downloads."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import cache
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from _text import LINES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT = 8  # characters of a line that are the prompt; the rest is the answer
TEXTS = [line.decode() for line in LINES if len(line) >= PROMPT + 8]
TRAIN, TEST = TEXTS[200:], TEXTS[:200]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, with a token for padding and one for the end of a line."""
    names = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", eos_token="<end>", padding_side="left", model_max_length=64
    )
    made.chat_template = (
        "{% for x in messages %}{{ x.content }}{% if x.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    )
    return made


def llama(width: int, layers: int) -> LlamaForCausalLM:
    size = {"vocab_size": len(tokenizer()), "max_position_embeddings": 64}
    size |= {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    special = {"pad_token_id": tokenizer().pad_token_id, "eos_token_id": tokenizer().eos_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**size, **special))


def rows(texts: list[str]) -> list[dict[str, list[int]]]:
    """The tokens and labels of each text; the labels of its prompt are -100."""
    made = []
    for text in texts:
        tokens = [*tokenizer()(text)["input_ids"], tokenizer().eos_token_id]
        made.append({"input_ids": tokens, "labels": [-100] * PROMPT + tokens[PROMPT:]})
    return made


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of different lengths as one batch, padded on the right; padding has the label -100."""

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)

    tokens = padded("input_ids", 0)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": padded("labels", -100)}


@cache
def teacher(steps: int = 120) -> LlamaForCausalLM:
    """A Llama trained on the lines."""
    torch.manual_seed(0)
    model, draw = llama(64, 2), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        drawn = torch.randint(len(TRAIN), (32,), generator=draw).tolist()
        optimizer.zero_grad()
        model(**collate(rows([TRAIN[i] for i in drawn]))).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def peak(step: Callable[[], Any]) -> float:
    """The peak MiB that a step adds, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    records = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = (x.nbytes() for x in sorted(records, key=lambda x: x.start_ns()))
    return max(itertools.accumulate(changes)) / 2**20
