"""A tiny random model that can read any data set: to run a whole loop on real questions, offline.

    python recipes/byte_bpe_model.py dataset=../shared/data/gsm8k out=runs/byte-bpe
    torchrun recipes/gsm8k_grpo.py model=runs/byte-bpe dataset=../shared/data/gsm8k

It will not learn: its weights are random, and almost every reward is 0. Its tokenizer is byte-level
BPE, trained on the questions and answers, so that lengths are like those of a real model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, trainers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from arealite.config import parse
from arealite.data import load_rows
from arealite.data.tiny_model import (
    SPECIAL_TOKENS,
    chat_tokenizer,
    tiny_config,
    write_model_folder,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the model looks like."""

    dataset: str = "openai/gsm8k"
    """Hugging Face id, or a folder or file of rows with `question` and `answer`."""
    out: str = "runs/byte-bpe"
    """Becomes the model folder; one that is there is replaced when the new one is complete."""
    vocab_size: int = 2_000
    """Tokens, with 256 bytes and the special ones; a small data set may give fewer."""
    num_layers: int = 2
    """Transformer layers of hidden size 128."""
    max_positions: int = 1_024
    """Longest context in tokens."""
    seed: int = 1
    """The random weights derive from it."""


def train_tokenizer(texts: list[str], *, vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with our chat template; any text comes back as it was."""
    # Qwen2Tokenizer's own way to split, because every folder of type qwen2 is read with it.
    untrained = Tokenizer(BPE())
    untrained.normalizer = Qwen2Tokenizer().backend_tokenizer.normalizer
    untrained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    untrained.train_from_iterator(texts, trainer)
    merges = json.loads(untrained.to_str())["model"]["merges"]
    return chat_tokenizer(untrained.get_vocab(), [(left, right) for left, right in merges])


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    rows = load_rows(cfg.dataset, split="train")
    texts = [text for row in rows for text in (row["question"], row["answer"])]
    tokenizer = train_tokenizer(texts, vocab_size=cfg.vocab_size)
    config = tiny_config(tokenizer, num_layers=cfg.num_layers, max_positions=cfg.max_positions)
    model = Qwen2ForCausalLM(config).bfloat16()
    write_model_folder(Path(cfg.out), model, tokenizer)
    print(f"{cfg.out}: {len(tokenizer)} tokens, {model.num_parameters() / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main(parse(Config))
