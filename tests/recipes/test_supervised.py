"""sft.py and dpo.py: no server, and the numbers of a slow second implementation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from arealite.config import parse
from arealite.data import GSM8K_MINI, MINI_PREFERENCES, TINY_MATH, load_rows, resolve_model
from arealite.observe.metrics import read_metrics
from arealite.training.fsdp import FSDPEngine
from recipes import dpo, sft

SMALL = {"steps": 2, "max_eval_rows": 8, "eval_every_steps": 1, "save_every_steps": 1}


def run(recipe: Any, out_dir: Path, **changes: object) -> dict[int, dict[str, float]]:
    size = "rows_per_step" if recipe is sft else "pairs_per_step"
    settings = {"out_dir": out_dir, size: 6, **SMALL, **changes}
    recipe.main(parse(recipe.Config, [f"{key}={value}" for key, value in settings.items()]))
    return read_metrics(out_dir)


@pytest.fixture(scope="module")
def logprob_of() -> Callable[[str, str], tuple[float, int]]:
    """Log-probability of an answer to a question with its end token, and its length, by plain
    transformers."""
    folder = resolve_model(TINY_MATH)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def compute(question: str, answer: str) -> tuple[float, int]:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        context = tokenizer.encode(prompt)
        response = tokenizer.encode(f"{answer}{tokenizer.eos_token}")
        logits = model(torch.tensor([context + response])).logits[0, len(context) - 1 : -1]
        found = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])
        return float(found.sum()), len(response)

    return compute


def test_the_loss_of_answers_is_their_mean_negative_log_probability(
    tmp_path: Path, logprob_of: Callable[[str, str], tuple[float, int]]
):
    steps = run(sft, tmp_path)
    found = [
        logprob_of(row["question"], row["answer"])
        for row in load_rows(GSM8K_MINI, split="test")[:8]
    ]
    expected = -sum(total for total, _ in found) / sum(length for _, length in found)
    assert steps[0]["eval/loss"] == pytest.approx(expected, rel=1e-4)
    assert steps[2]["eval/loss"] < steps[0]["eval/loss"]
    assert steps[2]["train/loss"] > 0 and steps[2]["train/tokens"] > 6


def test_a_policy_learns_to_prefer_what_was_chosen(tmp_path: Path):
    steps = run(dpo, tmp_path, **{"train.lr": 3e-4, "train.warmup_steps": 0})
    assert steps[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)  # -log sigmoid(0)
    assert steps[0]["eval/margin"] == 0.0
    assert steps[2]["eval/loss"] < steps[0]["eval/loss"]
    assert steps[2]["eval/margin"] > 0
    assert steps[2]["eval/preferred"] > 0.5


@pytest.mark.parametrize("max_tokens", [120, 8_192])
def test_pairs_have_the_loss_of_the_paper_however_they_are_cut(
    max_tokens: int, logprob_of: Callable[[str, str], tuple[float, int]]
):
    """The policy is the embedded model, and the reference another one."""
    rows = load_rows(MINI_PREFERENCES, split="test")[:5]
    cfg = dpo.Config(beta=0.3)
    cfg = replace(cfg, train=replace(cfg.train, micro_batch_tokens=max_tokens))
    template = dpo.ChatTemplate(dpo.load_tokenizer(TINY_MATH))
    pairs = [dpo.compare(row, place, template, cfg) for place, row in enumerate(rows)]

    class Shifted:
        """Says of each token that it was half a nat less likely."""

        def logprobs(self, minibatch: list[Any]) -> list[torch.Tensor]:
            return [each - 0.5 for each in engine.logprobs(minibatch)]

    with FSDPEngine(TINY_MATH, cfg.train) as engine:
        reference: Any = Shifted()
        minibatch = dpo.minibatch_of(pairs, reference, cfg)
        found = dpo.evaluate(engine, minibatch, cfg)
    assert (len(minibatch) > 1) == (max_tokens == 120)
    margins = []
    for row in rows:
        (_, chosen), (_, rejected) = (
            logprob_of(row["question"], row[k]) for k in ("chosen", "rejected")
        )
        margins.append(0.5 * (chosen - rejected))
    expected = -logsigmoid(cfg.beta * torch.tensor(margins)).mean()
    assert found["eval/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["eval/margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-5)
    assert found["eval/preferred"] == 1.0


@pytest.mark.parametrize("recipe", [sft, dpo])
def test_a_run_that_was_stopped_goes_on_with_the_same_steps(recipe: Any, tmp_path: Path):
    whole = run(recipe, tmp_path / "whole", steps=3)
    run(recipe, tmp_path / "parts", steps=1)
    parts = run(recipe, tmp_path / "parts", steps=3)
    for version in (2, 3):
        for name in ("train/loss", "train/grad_norm"):
            assert parts[version][name] == whole[version][name]


def test_two_hundred_rows_are_two_hundred_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    learn = sft.learn

    def noted(row: Any, place: int, *rest: Any) -> Any:
        seen.append(row["question"]) if place >= 0 else None
        return learn(row, place, *rest)

    monkeypatch.setattr(sft, "learn", noted)
    run(sft, tmp_path, max_rows=4, rows_per_step=8, steps=1)
    first = [row["question"] for row in load_rows(GSM8K_MINI, split="train")[:4]]
    assert sorted(seen) == sorted(first * 2)  # two epochs


@pytest.mark.parametrize("recipe", [sft, dpo])
def test_rows_without_a_test_split_are_enough(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = load_rows(MINI_PREFERENCES, split="train")[:8]
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = run(recipe, tmp_path / "out", dataset=folder, max_eval_rows=0)
    assert "eval/loss" not in steps[2] and steps[2]["train/loss"] > 0
