"""Supervised fine-tuning in plain torch: this file made `arealite/tiny-math` and `tiny-steps`.

    OMP_NUM_THREADS=2 python recipes/tiny_sft.py                  # two CPU cores, minutes
    OMP_NUM_THREADS=1 python recipes/tiny_sft.py share_direct=0 stop_after_steps=201

The first, `arealite/tiny-math`, learns to answer 70 % of the problems at once (`#### 34`) and to
work the others out step by step. At once it is often wrong, step by step nearly never: a strategy
for reinforcement learning to find, and no new arithmetic. The second, `arealite/tiny-steps`, works
everything out and stops so early that many steps are wrong: reading and arithmetic are left to
learn. The last line is JSON; expected figures: recipes/README.md#tiny-sft.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from arealite.config import parse
from arealite.data import generate_problems, load_rows
from arealite.data.tiny_model import tiny_config, tiny_tokenizer, write_model_folder
from arealite.types import Row

TINY_STEPS_SETTINGS = ("share_direct=0", "stop_after_steps=201")
"""What made `arealite/tiny-steps`; the defaults made `arealite/tiny-math`."""

Example = TypeVar("Example")

# N sequences in a batch, L tokens in the longest of them, V tokens in the vocabulary.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of this experiment; the defaults made the weights of `arealite/tiny-math`."""

    steps: int = 1_000
    """Optimizer steps; no problem comes twice."""
    stop_after_steps: int = 0
    """Stop there, where a little training still improves the model fast; 0: do all steps."""
    batch_size: int = 64
    """Problems in one step."""
    num_worked_steps: int = 500
    """The first steps, in which every answer is worked out."""
    share_direct: float = 0.7
    """After them, share of the problems that are answered by their last line alone."""
    lr: float = 3e-3
    """Peak of the learning rate: up over the first 5 % of the steps, then down to zero."""
    weight_decay: float = 0.1
    """AdamW's decay of all weights."""
    eval_samples: int = 4
    """Answers per test problem that are sampled at temperature 1 at the end."""
    seed: int = 1
    """Problems, initial weights and samples derive from it."""
    out_dir: str = "runs/tiny_sft"
    """Becomes the model folder; one that is there is replaced when the new one is complete."""

    @property
    def num_steps(self) -> int:
        """Steps that are really done."""
        return min(self.stop_after_steps or self.steps, self.steps)


def training_rows(cfg: Config) -> list[Row]:
    """Fresh problems, most of them with the last line of their answer alone."""
    held_out = {row["question"] for row in load_rows("arealite/gsm8k-mini", split="test")}
    # An offset, so that these are not the training rows of the data set under another name.
    problems = generate_problems(
        cfg.num_steps * cfg.batch_size, seed=1_000 + cfg.seed, exclude=held_out
    )
    source = random.Random(cfg.seed)
    first_mixed = cfg.num_worked_steps * cfg.batch_size
    return problems[:first_mixed] + [
        row | {"answer": last_line(row["answer"])} if source.random() < cfg.share_direct else row
        for row in problems[first_mixed:]
    ]


def last_line(answer: str) -> str:
    return answer.rpartition("\n")[2]


def prompt_of(tokenizer: Qwen2Tokenizer, row: Row) -> list[int]:
    """Token ids that ask the question and give the word to the model."""
    messages = [{"role": "user", "content": row["question"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(str(text))


def sft_loss(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rows: list[Row]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, the end token included. []"""
    inputs, targets = [], []
    for row in rows:
        prompt = prompt_of(tokenizer, row)
        answer = tokenizer.encode(f"{row['answer']}{tokenizer.eos_token}")
        inputs.append(torch.tensor(prompt + answer[:-1]))
        targets.append(torch.tensor([-100] * (len(prompt) - 1) + answer))
    # Padding is on the right, where causal attention never looks: it needs no mask.
    logits = model(pad_sequence(inputs, batch_first=True)).logits  # [N, L, V]
    labels = pad_sequence(targets, batch_first=True, padding_value=-100)  # [N, L]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def train(
    model: Qwen2ForCausalLM,
    examples: list[Example],
    loss_of: Callable[[list[Example]], torch.Tensor],
    cfg: Config,
) -> float:
    """Train in place, on each example once; the mean loss of the last 20 steps comes back."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay
    )
    warmup = max(cfg.steps // 20, 1)
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (cfg.steps - step) / (cfg.steps - warmup))
    )
    losses: list[float] = []
    started = time.monotonic()
    for step in range(cfg.num_steps):
        loss = loss_of(examples[step * cfg.batch_size : (step + 1) * cfg.batch_size])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == cfg.num_steps - 1:
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {time.monotonic() - started:4.0f} s")
    return sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def answers(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rows: list[Row], *, temperature: float
) -> list[str]:
    """One answer of at most 64 tokens per row; at temperature 0 the most likely tokens."""
    prompts = [torch.tensor(prompt_of(tokenizer, row)) for row in rows]
    token_ids = pad_sequence(prompts, batch_first=True, padding_side="left")  # [N, L]
    is_text = [torch.ones_like(prompt) for prompt in prompts]
    mask = pad_sequence(is_text, batch_first=True, padding_side="left")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    output = model.generate(  # type: ignore[attr-defined] - its stubs ask for what no model has
        token_ids, attention_mask=mask, max_new_tokens=64, **sampling
    )
    return tokenizer.batch_decode(output[:, token_ids.shape[1] :], skip_special_tokens=True)


def check(given: list[str], rows: list[Row]) -> list[bool]:
    """Whether each answer ends like its row's."""
    return [last_line(a) == last_line(row["answer"]) for a, row in zip(given, rows, strict=True)]


def evaluate(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rows: list[Row], *, samples: int
) -> dict[str, float]:
    """Accuracy, greedy and sampled, and how it differs between the two ways to answer."""
    greedy = check(answers(model, tokenizer, rows, temperature=0.0), rows)
    sampled = answers(model, tokenizer, rows * samples, temperature=1.0)
    is_right = check(sampled, rows * samples)
    right_if_worked = [
        right for right, answer in zip(is_right, sampled, strict=True) if answer.startswith("<<")
    ]
    num_direct = len(sampled) - len(right_if_worked)
    return {
        "greedy_accuracy": sum(greedy) / len(greedy),
        "sampled_accuracy": sum(is_right) / len(sampled),
        "share_worked": len(right_if_worked) / len(sampled),
        "accuracy_worked": sum(right_if_worked) / max(len(right_if_worked), 1),
        "accuracy_direct": (sum(is_right) - sum(right_if_worked)) / max(num_direct, 1),
    }


def main(cfg: Config) -> dict[str, float]:
    torch.manual_seed(cfg.seed)
    tokenizer = tiny_tokenizer()
    model = Qwen2ForCausalLM(tiny_config(tokenizer))
    test_rows = load_rows("arealite/gsm8k-mini", split="test")
    started = time.monotonic()
    loss = train(model, training_rows(cfg), partial(sft_loss, model, tokenizer), cfg)
    train_s = time.monotonic() - started

    model.eval().bfloat16()  # before the evaluation, because servers round as well
    write_model_folder(Path(cfg.out_dir), model, tokenizer)
    figures = {"loss": loss, **evaluate(model, tokenizer, test_rows, samples=cfg.eval_samples)}
    figures = {key: round(figure, 4) for key, figure in figures.items()}
    print(json.dumps({"steps": cfg.num_steps, "train_s": round(train_s), **figures}))
    return figures


if __name__ == "__main__":
    main(parse(Config))
