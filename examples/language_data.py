"""A text that ships with Python, byte by byte or in learned pieces, and small Llamas built from a config.

The text is the standard library's own modules (the .py files directly in Lib), split by file: every tenth for
validation, every tenth for testing, the others for training.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 128
BYTES = 256


class Texts(NamedTuple):
    """The three parts, whole."""

    train: str
    validation: str
    test: str


@cache
def texts() -> Texts:
    """The standard library by file, sorted by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: list[list[str]] = [[], [], []]
    for i, path in enumerate(paths):
        part = {8: 1, 9: 2}.get(i % 10, 0)
        parts[part].append(path.read_text(encoding="utf-8", errors="replace"))
    return Texts(*("\n".join(part) for part in parts))


def byte_sequences(text: str) -> Tensor:
    """[n, CONTEXT] int64, one after the other."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return data[: len(data) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def piece_sequences(text: str, vocabulary: int) -> tuple[Tensor, int]:
    """[n, CONTEXT] of byte-pair pieces that are learned from the text, and how many there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    ids = torch.tensor(tokenizer.encode(text).ids)
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT), tokenizer.get_vocab_size()


def llama(width: int, layers: int, vocabulary: int, seed: int) -> LlamaForCausalLM:
    """GPT-style: a decoder with rotary positions; heads of 32, the output head not tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)
