"""The settings of published runs: prompt, reward and one step of each, at toy size."""

import asyncio
import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arealite import dist
from arealite.algo.advantages import batch_normalized, reward_advantages
from arealite.algo.shaping import scaled_rewards
from arealite.config import parse, to_dict
from arealite.data import load_rows
from arealite.rollout.chat_template import ChatTemplate
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import ScriptedEngine, byte_tokenizer, make_tiny_model
from arealite.training.fsdp import FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import LossFn, MicroBatch, Trajectory
from recipes import sft
from recipes.gsm8k_grpo import grpo_loss
from tests.data.published import ASKED, BOBA_QUESTION, CODE, PUBLISHED, SFT_ANSWER
from tests.rollout.chat_templates import template_tokenizer

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
R1, QWEN3 = "deepseek_r1", "qwen3"
BOXED = r"Please reason step by step, and enclose your final answer in \boxed{}."

# Recipe, format of its rows, template, and the prompt, of the rows of tests/data/published.py.
RUNS: dict[str, tuple[str, str, str, str]] = {
    "areal_v0.1_1.5b": (
        *("lengthen_context", "DeepScaleR", R1),
        f"<｜begin▁of▁sentence｜>{BOXED}<｜User｜>{ASKED}<｜Assistant｜><think>\n",  # noqa: RUF001
    ),
    "areal_v0.2_7b": (
        *("math_ppo", "AReaL-boba-106k", R1),
        f"<｜begin▁of▁sentence｜><｜User｜>{BOBA_QUESTION}<｜Assistant｜><think>\n",  # noqa: RUF001
    ),
    "areal_v0.2_32b_sft": (
        *("sft", "AReaL-boba-SFT-200", R1),
        f"<｜begin▁of▁sentence｜><｜User｜>{BOBA_QUESTION}<｜Assistant｜><think>\n",  # noqa: RUF001
    ),
    **{
        f"areal_v0.3_{size}": (
            *("code_ppo", "AReaL-boba-2-RL-Code", QWEN3),
            f"<|im_start|>user\n{CODE}<|im_end|>\n<|im_start|>assistant\n",
        )
        for size in ("8b", "14b")
    },
}
V0_3 = {
    **{"rollout.prompts_per_step": 128, "group_size": 16, "minibatches": 1, "train.lr": 2e-5},
    **{"train.eps": 1e-5, "rollout.max_staleness": 16, "behavior_weight_cap": 5.0},
}
"""The table of the blog, whose batch of 2,048 is 128 x 16."""
WITH_REWARD = [name for name in RUNS if not name.endswith("sft")]


def recipe_of(name: str) -> Any:
    return importlib.import_module(f"recipes.{RUNS[name][0]}")


def settings(name: str, *changes: str) -> Any:
    path = CONFIGS / f"{name}.yaml"
    return parse(recipe_of(name).Config, ["--config", str(path), *changes])


def row_of(name: str, folder: Path) -> Any:
    """A row in the schema of the run's data set, as the recipe reads it."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(PUBLISHED[RUNS[name][1]].row) + "\n")
    required = ("question",) if RUNS[name][0] == "code_ppo" else ("question", "answer")
    [row] = load_rows(str(path), split="train", required=required)
    return row


def test_every_published_run_is_tested():
    assert {path.stem for path in CONFIGS.glob("areal_*.yaml")} == set(RUNS)


@pytest.mark.parametrize(
    ("name", "published"),
    {
        "areal_v0.1_1.5b": {
            **{"rollout.prompts_per_step": 1024, "group_size": 8, "right_reward": 5.0},
            **{"wrong_reward": -5.0, "sampling.max_new_tokens": 24_576},
        },
        "areal_v0.2_7b": {
            **{"rollout.prompts_per_step": 512, "group_size": 16, "minibatches": 4},
            **{"sampling.max_new_tokens": 27_648, "train.lr": 2e-5, "train.eps": 1e-5},
        },
        "areal_v0.2_32b_sft": {"max_rows": 200, "rows_per_step": 64, "train.lr": 1e-5},
        "areal_v0.3_8b": V0_3,
        "areal_v0.3_14b": V0_3,
    }.items(),
)
def test_the_tables_of_the_reports_are_kept(name: str, published: dict[str, float]):
    assert to_dict(settings(name)).items() >= published.items()


def test_the_budget_rises_in_three_stages():
    cfg = settings("areal_v0.1_1.5b")
    budgets = [tokens for _, tokens in cfg.stages] + [cfg.sampling.max_new_tokens]
    assert budgets == [8 * 1024, 16 * 1024, 24 * 1024]


@pytest.mark.parametrize("name", RUNS)
def test_every_number_has_its_source(name: str):
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        key, _, value = line.partition(": ")
        if any(character.isdigit() for character in value.partition(" #")[0]) and key != "out_dir":
            assert line.startswith("#") or " # " in line, line


@pytest.mark.parametrize("name", RUNS)
def test_the_prompt_is_as_it_was_published(name: str, tmp_path: Path):
    _, _, template, expected = RUNS[name]
    row = row_of(name, tmp_path)
    tokenizer = template_tokenizer(template)
    if name not in WITH_REWARD:
        answer = recipe_of(name).learn(row, 0, ChatTemplate(tokenizer), settings(name))
        length = answer.loss_mask.index(True)
        assert tokenizer.decode(answer.token_ids[:length]) == expected
        learned = tokenizer.decode(answer.token_ids[length:-1])
        assert learned == SFT_ANSWER.removeprefix("<think>\n")
        return
    workflow = workflow_of(name, tokenizer)
    assert tokenizer.decode(workflow.start(row["question"]).token_ids) == expected


def workflow_of(name: str, tokenizer: Any, **changes: Any) -> SingleTurnWorkflow:
    cfg, recipe = settings(name), recipe_of(name)
    recipe = recipe.math_ppo if RUNS[name][0] == "lengthen_context" else recipe
    reward = recipe.code_reward if RUNS[name][0] == "code_ppo" else recipe.math_reward
    return SingleTurnWorkflow(
        tokenizer, reward, cfg.sampling, system_prompt=cfg.system_prompt, **changes
    )


def right_and_wrong(name: str, row: Any) -> list[Trajectory]:
    """A group of two, rewarded by the recipe."""
    published, tokenizer = PUBLISHED[RUNS[name][1]], byte_tokenizer()
    says = iter([published.right, published.wrong])
    engine = ScriptedEngine(lambda conversation: next(says), tokenizer)
    group = asyncio.run(workflow_of(name, tokenizer, group_size=2).arun_episode(engine, row))
    assert group is not None
    return group


@pytest.mark.parametrize("name", WITH_REWARD)
def test_right_earns_five_and_wrong_loses_five(name: str, tmp_path: Path):
    cfg, group = settings(name), right_and_wrong(name, row_of(name, tmp_path))
    assert [trajectory.reward for trajectory in group] == [1.0, 0.0]
    [scaled] = scaled_rewards([group], right=cfg.right_reward, wrong=cfg.wrong_reward)
    assert [trajectory.reward for trajectory in scaled] == [5.0, -5.0]


def minibatch_of(name: str, cfg: Any, row: Any, engine: FSDPEngine) -> list[MicroBatch]:
    """What the recipe's first step trains on, with one row in the batch."""
    if name not in WITH_REWARD:
        return sft.minibatch_of([sft.learn(row, 0, ChatTemplate(byte_tokenizer()), cfg)], cfg)
    groups = scaled_rewards(
        [right_and_wrong(name, row)], right=cfg.right_reward, wrong=cfg.wrong_reward
    )
    advantages = reward_advantages(groups)
    [minibatch] = pack(
        groups,
        batch_normalized(advantages, groups, over="tokens", sum_over_ranks=dist.sum),
        num_minibatches=1,
        max_tokens=cfg.train.micro_batch_tokens,
        aggregation="token",
    )
    return attach(minibatch, proximal_logprobs=engine.logprobs(minibatch))


@pytest.mark.parametrize("name", RUNS)
def test_the_first_step_moves_weights_by_the_learning_rate(name: str, tmp_path: Path):
    """Adam's first step is lr * gradient / (|gradient| + eps), and the decay is lr times it."""
    cfg, row = settings(name), row_of(name, tmp_path)
    folder = make_tiny_model(tmp_path / "model", max_model_len=1_024, dtype=torch.float32)
    loss_fn: LossFn = sft.sft_loss
    if name in WITH_REWARD:
        loss_fn = partial(grpo_loss, cfg=cfg)
    train = replace(cfg.train, dtype="float32")
    with FSDPEngine(folder, train) as engine:
        stats = engine.step(minibatch_of(name, cfg, row, engine), loss_fn)
        engine.save_pretrained(tmp_path / "trained")
    assert 0 < stats.grad_norm < float("inf")
    lr = cfg.train.lr / cfg.train.warmup_steps
    before, after = (
        load_file(place / "model.safetensors")
        for place in (tmp_path / "model", tmp_path / "trained")
    )
    largest = 0.0
    for key, weight in before.items():
        moved = (after[key] - weight).abs()
        allowed = lr * (1 + cfg.train.weight_decay * weight.abs())
        assert (moved <= 1.001 * allowed + 1e-7).all(), key
        largest = max(largest, float(moved.max()))
    assert largest > 0.9 * lr


@pytest.mark.parametrize("name", RUNS)
def test_its_numbers_are_explained(name: str, capsys: pytest.CaptureFixture[str]):
    cfg = settings(name)
    with pytest.raises(SystemExit) as ended:
        settings(name, "--explain")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"{cfg.steps:,}" in text
    if name in WITH_REWARD:
        sequences = cfg.rollout.prompts_per_step * cfg.group_size
        longest = cfg.sampling.max_new_tokens
        stages = (*getattr(cfg, "stages", ()), (cfg.steps, longest))
        budgets = [next(most for end, most in stages if step < end) for step in range(cfg.steps)]
        assert f"{sequences:,}" in text
        assert f"{sequences * longest:,}" in text
        assert f"{sequences * sum(budgets):,}" in text
    assert "DOES NOT" not in text and max(map(len, text.splitlines())) <= 100
