"""Supervised fine-tuning of `arealite/tiny-agent`, which can do three things, none of them well.

    OMP_NUM_THREADS=2 python recipes/tiny_agent_sft.py            # two CPU cores, minutes

With a calculator at hand it mostly answers at once, although the numbers are too large for it. Told
that an answer is wrong, it mostly says the same again. Its programs mostly forget that what they
read is text. In each case it knows the better way and takes it now and then: so there is a strategy
for reinforcement learning to find. The last line is JSON with what was reached; expected figures:
recipes/README.md#tiny-agent-sft.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from arealite.config import parse
from arealite.data import (
    GSM8K_LARGE,
    GSM8K_MINI,
    TINY_PROGRAMS,
    load_rows,
    load_tokenizer,
)
from arealite.data.tiny_model import agent_tokenizer, tiny_config, write_model_folder
from arealite.inference.hf import HFEngine
from arealite.rewards.code import code_reward
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.executor import run_episodes
from arealite.rollout.workflows import (
    ChatWorkflow,
    MultiTurnWorkflow,
    SingleTurnWorkflow,
    ToolWorkflow,
)
from arealite.types import SamplingParams, Trajectory
from recipes import tiny_sft
from recipes.gsm8k_agent import calculate
from recipes.tiny_agent_lessons import FEEDBACK, Lesson, lessons
from recipes.tiny_sft import train

# N conversations in half a batch, L tokens in the longest of them, V tokens in the vocabulary.


@dataclass(frozen=True, kw_only=True)
class Config(tiny_sft.Config):
    """Every knob of this experiment; the defaults made the weights that arealite ships."""

    steps: int = 1_200
    """Optimizer steps; no problem comes twice, programs do."""
    num_worked_steps: int = 900
    """The first steps, in which every lesson shows the better way."""
    share_direct: float = 0.72
    """After them, share of lessons without the tool, and of those without a second thought."""
    out_dir: str = "runs/tiny_agent_sft"
    """Becomes the model folder; one that is there is replaced when the new one is complete."""


def lesson_loss(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, batch: list[Lesson]
) -> torch.Tensor:
    """Mean cross-entropy of the tokens to be learned, end tokens included. []"""
    encoded = sorted((encode(tokenizer, lesson) for lesson in batch), key=lambda pair: len(pair[0]))
    half = len(encoded) // 2
    total, count = torch.zeros(()), 0
    for part in (encoded[:half], encoded[half:]):  # short ones apart, which saves padding
        inputs = [token_ids[:-1] for token_ids, _ in part]
        targets = [torch.where(is_learned, ids, -100)[1:] for ids, is_learned in part]
        # Padding is on the right, where causal attention never looks: it needs no mask.
        logits = model(pad_sequence(inputs, batch_first=True)).logits  # [N, L, V]
        labels = pad_sequence(targets, batch_first=True, padding_value=-100)  # [N, L]
        total += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count += int((labels >= 0).sum())
    return total / count


def encode(tokenizer: Qwen2Tokenizer, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and which of them are learned: the assistant's, with each end token. [L]"""

    def ids_of(count: int, *, is_open: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            lesson.messages[:count],
            tools=lesson.tools,  # type: ignore[arg-type] - a list may hold functions beside them
            tokenize=False,
            add_generation_prompt=is_open,
        )
        return tokenizer.encode(str(text))

    token_ids = torch.tensor(ids_of(len(lesson.messages), is_open=False))
    is_learned = torch.zeros(len(token_ids), dtype=torch.bool)
    roles = [message["role"] for message in lesson.messages]
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    for index in answers[lesson.num_given :]:
        start, end = len(ids_of(index, is_open=True)), len(ids_of(index + 1, is_open=False))
        is_learned[start:end] = True
    return token_ids, is_learned


def evaluate(folder: str, *, samples: int) -> dict[str, float]:
    """What the model does on the test rows of its three tasks, sampled at temperature 1."""
    tokenizer = load_tokenizer(folder)
    settings = {"sampling": SamplingParams(max_new_tokens=64), "group_size": samples}
    with HFEngine(folder, dtype=torch.bfloat16, max_running=200) as engine:
        ask = partial(ask_all, engine)
        tools = {"tools": [calculate], "max_turns": 6}
        large = ask(ToolWorkflow(tokenizer, gsm8k_reward, **settings, **tools), GSM8K_LARGE)
        small = ask(
            MultiTurnWorkflow(tokenizer, gsm8k_reward, feedback=FEEDBACK, **settings), GSM8K_MINI
        )
        programs = ask(SingleTurnWorkflow(tokenizer, code_reward, **settings), TINY_PROGRAMS)
    with_calls = [sample for sample in large if sample.metrics["tool_calls"]]
    corrected = [sample for sample in small if "reward_turn_2" in sample.metrics]
    return {
        "accuracy_large": mean_reward(large),
        "share_with_calls": len(with_calls) / len(large),
        "accuracy_with_calls": mean_reward(with_calls),
        "accuracy_turn_1": fmean(sample.metrics["reward_turn_1"] for sample in small),
        "accuracy_turn_2": fmean(sample.metrics["reward_turn_2"] for sample in corrected),
        "pass_rate": mean_reward(programs),
    }


def ask_all(engine: HFEngine, workflow: ChatWorkflow, dataset: str) -> list[Trajectory]:
    """All conversations about the test rows."""
    groups = run_episodes(engine, workflow, load_rows(dataset, split="test"))
    return [sample for group in groups for sample in group]


def mean_reward(samples: list[Trajectory]) -> float:
    return fmean(sample.reward for sample in samples) if samples else 0.0


def main(cfg: Config) -> dict[str, float]:
    torch.manual_seed(cfg.seed)
    tokenizer = agent_tokenizer()
    model = Qwen2ForCausalLM(tiny_config(tokenizer, max_positions=1_024))

    taught = lessons(
        cfg.num_steps * cfg.batch_size,
        num_better=cfg.num_worked_steps * cfg.batch_size,
        share_hasty=cfg.share_direct,
        # An offset, so that these are not the training rows of the data sets under another name.
        seed=1_000 + cfg.seed,
    )
    started = time.monotonic()
    loss = train(model, taught, partial(lesson_loss, model, tokenizer), cfg)
    train_s = time.monotonic() - started

    write_model_folder(Path(cfg.out_dir), model.eval().bfloat16(), tokenizer)
    figures = {"loss": loss, **evaluate(cfg.out_dir, samples=cfg.eval_samples)}
    figures = {key: round(figure, 4) for key, figure in figures.items()}
    print(json.dumps({"steps": cfg.num_steps, "train_s": round(train_s), **figures}))
    return figures


if __name__ == "__main__":
    main(parse(Config))
