"""Recipes that differ from gsm8k_grpo.py in their algorithm, with a policy that is a function."""

import json
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from arealite.config import parse
from arealite.data import GSM8K_MINI, TINY_AGENT, load_rows, load_tokenizer
from arealite.errors import ConfigError, RolloutError
from arealite.observe.metrics import read_metrics
from arealite.testing import ScriptedServer
from arealite.types import MicroBatch
from recipes import (
    filter_by_difficulty,
    gsm8k_dapo,
    gsm8k_gspo,
    gsm8k_ppo,
    lengthen_context,
    math_ppo,
)
from tests.recipes.scripted import NUM_ROWS, first_rows, run_with_policy

ANSWERS = {
    row["question"]: row["answer"]
    for split in ("train", "test")
    for row in load_rows(GSM8K_MINI, split=split)
}


def question_of(conversation: str) -> str:
    return conversation.partition("<|user|>")[2].partition("<|end|>")[0]


def right_every_other_time() -> Callable[[str], str]:
    calls = count()
    return lambda text: "#### 0" if next(calls) % 2 else ANSWERS[question_of(text)]


def rollouts(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "rollouts.jsonl").read_text().splitlines()]


def test_each_stage_has_its_budget_and_goes_on_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = partial(run_with_policy, lengthen_context, right_every_other_time(), tmp_path)
    changes = ["stages=[[1,30]]", "sampling.max_new_tokens=50", "minibatches=1"]
    run(*changes, loop=math_ppo)
    assert [line["version"] for line in rollouts(tmp_path)] == [1] * 4 + [2] * 4
    printed = capsys.readouterr().out
    assert f"{tmp_path} continues after step 1." in printed
    assert "sampling.max_new_tokens: 30 -> 50" in printed
    # Once more with another step: the first stage is not begun again.
    run(*changes, "steps=3", loop=math_ppo)
    assert "sampling.max_new_tokens" not in capsys.readouterr().out
    assert read_metrics(tmp_path)[3]["train/grad_norm"] > 0


@pytest.mark.parametrize(
    "stages", ["[[2,30]]", "[[1,50]]", "[[1,30],[1,40]]", "[[0,30]]", "[[1,0]]"]
)
def test_stages_that_do_not_rise_are_refused(stages: str):
    settings = ["steps=2", "sampling.max_new_tokens=50", f"stages={stages}"]
    with pytest.raises(ConfigError, match=r"must rise from stage to stage.* up to steps=2"):
        parse(lengthen_context.Config, settings)


@pytest.mark.parametrize("recipe", [gsm8k_gspo, gsm8k_ppo, math_ppo])
def test_it_takes_its_steps(recipe: Any, tmp_path: Path):
    changes = ["minibatches=2"]
    changes += ["critic_warmup_steps=1"] if recipe is gsm8k_ppo else []
    figures = run_with_policy(recipe, right_every_other_time(), tmp_path, *changes)
    assert figures["train/grad_norm"] > 0
    assert figures["rollout/raw_reward"] == pytest.approx(0.5)


def test_the_critic_learns_alone_at_first_and_its_knowledge_is_logged(tmp_path: Path):
    run_with_policy(gsm8k_ppo, right_every_other_time(), tmp_path, "critic_warmup_steps=1")
    first, second = (read_metrics(tmp_path)[version] for version in (1, 2))
    assert "train/grad_norm" not in first and second["train/grad_norm"] > 0
    assert first["critic/explained_variance"] == 0.0  # it expects 0 everywhere
    assert second["critic/explained_variance"] != 0.0


def test_a_token_pays_for_its_distance_from_the_reference():
    mb = MicroBatch(
        token_ids=torch.tensor([1, 2, 3]),
        cu_seqlens=torch.tensor([0, 3]),
        loss_mask=torch.tensor([False, True, True]),
        behavior_logprobs=torch.zeros(3),
        versions=torch.zeros(3),
        temperature=torch.ones(3),
        advantages=torch.tensor([0.0, 0.0, 1.0]),  # the reward, until `estimate`
        loss_weight=torch.ones(3),
        proximal_logprobs=torch.tensor([0.0, -1.0, -0.5]),
        ref_logprobs=torch.tensor([0.0, -3.0, -0.25]),
    )
    paying = gsm8k_ppo.rewards_of(mb, gsm8k_ppo.Config(kl_weight=0.1))
    torch.testing.assert_close(paying, torch.tensor([0.0, -0.2, 1.025]))
    assert torch.equal(gsm8k_ppo.rewards_of(mb, gsm8k_ppo.Config()), mb.advantages)


def test_a_reference_is_kept_where_distance_costs(tmp_path: Path):
    free, paying = (
        run_with_policy(
            gsm8k_ppo, right_every_other_time(), tmp_path / weight, f"kl_weight={weight}",
            "critic_warmup_steps=0", "train.lr=1e-2",
        )
        for weight in ("0", "100")
    )  # fmt: skip
    assert paying["critic/explained_variance"] != free["critic/explained_variance"]


def test_right_is_worth_five_and_wrong_minus_five(tmp_path: Path):
    run_with_policy(math_ppo, right_every_other_time(), tmp_path, "minibatches=1")
    assert {(line["reward"], line["raw_reward"]) for line in rollouts(tmp_path)} == {
        (5.0, 1.0),
        (-5.0, 0.0),
    }


def test_what_comes_near_the_budget_is_worth_less(tmp_path: Path):
    changes = ["overlong_tokens=64", "overlong_factor=0.5"]
    run_with_policy(gsm8k_dapo, right_every_other_time(), tmp_path, *changes)
    for line in rollouts(tmp_path):
        length = sum(line["loss_mask"])
        assert line["reward"] == pytest.approx(line["raw_reward"] - length / 64 * 0.5)


def test_questions_that_teach_nothing_are_passed_over_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Those of every other row are answered alike."""
    calls, seen = count(), dict[str, int]()

    def policy(text: str) -> str:
        place = seen.setdefault(question_of(text), len(seen))
        is_right = place % 2 == 0 or next(calls) % 2 == 0
        return ANSWERS[question_of(text)] if is_right else "#### 0"

    figures = run_with_policy(gsm8k_dapo, policy, tmp_path)
    assert figures["groups/constant_share"] == 0.0
    steps = read_metrics(tmp_path).values()
    extra = sum(step.get("groups/extra_samples", 0) for step in steps)
    sampled = sum(step.get("groups/sampled", 0) for step in steps)
    assert extra >= 2 and sampled >= 4 + extra / 2  # two steps of two groups of two
    # Of a step for which no group was sampled since the one before, there is no share.
    assert any(step.get("groups/sampled_constant_share", 0) > 0 for step in steps)
    assert "groups with unequal rewards" in capsys.readouterr().out
    assert (tmp_path / "lost.jsonl").read_text().count("rejected") > 0


def test_a_run_in_which_all_groups_are_equal_ends_and_says_so(tmp_path: Path):
    with pytest.raises(RolloutError, match=r"rows in a row gave no group \(rejected"):
        run_with_policy(gsm8k_dapo, lambda text: ANSWERS[question_of(text)], tmp_path)


def test_the_filter_keeps_what_is_sometimes_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    calls, seen = count(), dict[str, int]()

    def policy(text: str) -> str:
        """Of three questions one is always answered right, one never, and one now and then."""
        question = question_of(text)
        place = seen.setdefault(question, len(seen)) % 3
        is_right = place == 0 or (place == 1 and next(calls) % 2 == 0)
        return ANSWERS[question] if is_right else "#### 0"

    tokenizer = load_tokenizer(TINY_AGENT)

    def script(prompt: list[int]) -> list[int]:
        return tokenizer.encode(f"{policy(str(tokenizer.decode(prompt)))}{tokenizer.eos_token}")

    monkeypatch.setattr(filter_by_difficulty, "load_rows", first_rows)
    kept = {}
    size = {"vocab_size": len(tokenizer), "max_model_len": 1_024}
    with ScriptedServer(script, **size) as server:
        for keep_never in (True, False):
            seen.clear()
            settings = [f"out={tmp_path}", f"model={TINY_AGENT}", f"keep_never={keep_never}"]
            settings += [f"server.addresses=[{server.address}]", "samples=4"]
            filter_by_difficulty.main(parse(filter_by_difficulty.Config, settings))
            kept[keep_never] = load_rows(str(tmp_path), split="train")
    # The next recipe gets the file, which serves as its test rows, too.
    assert "dataset=runs/filtered/train.jsonl" in str(filter_by_difficulty.__doc__)
    assert load_rows(str(tmp_path / "train.jsonl"), split="test")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rows"] == NUM_ROWS
    assert figures["always_right"] + figures["never_right"] + figures["kept"] == NUM_ROWS
    assert {row["pass_rate"] for row in kept[True]} >= {0.0, 0.5}
    assert 1.0 not in {row["pass_rate"] for row in kept[True]}
    assert all(0 < row["pass_rate"] < 1 for row in kept[False])
    questions = [row["question"] for row in first_rows(GSM8K_MINI, split="train")]
    assert [q for q in questions if q in {row["question"] for row in kept[False]}] == [
        row["question"] for row in kept[False]
    ]
