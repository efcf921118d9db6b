import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.data import Part, load_rows, mixed
from arealite.errors import ConfigError, DataError
from arealite.rewards.by_row import RewardByRow
from arealite.rewards.code import code_reward
from arealite.rewards.math import math_reward
from arealite.rewards.zebra import zebra_reward
from arealite.rollout.executor import RolloutConfig, RolloutExecutor
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import ScriptedEngine, byte_tokenizer
from arealite.types import Row, SamplingParams
from tests.data.published import PUBLISHED

NAMES = ("math", "zebra", "code")


def rows(name: str, count: int) -> list[Row]:
    return [{"question": f"{name} {number}", "answer": "1"} for number in range(count)]


def parts(lengths: Sequence[int], shares: Sequence[float | None]) -> list[Part]:
    return [
        Part(rows=rows(name, length), reward=name, share=share)
        for name, length, share in zip(NAMES, lengths, shares, strict=False)
    ]


def test_shares_hold_over_the_mixture_and_small_parts_repeat():
    mixture = mixed(*parts([70, 10], [0.7, 0.3]), rewards=NAMES, seed=1)
    assert Counter(row["reward"] for row in mixture) == {"math": 70, "zebra": 30}
    times = Counter(row["question"] for row in mixture)
    assert {times[f"math {number}"] for number in range(70)} == {1}
    assert {times[f"zebra {number}"] for number in range(10)} == {3}


def test_without_shares_each_row_is_there_once():
    mixture = mixed(*parts([5, 3, 1], [None] * 3), rewards=NAMES, seed=1)
    assert sorted(row["question"] for row in mixture) == sorted(
        row["question"] for name, count in zip(NAMES, (5, 3, 1), strict=True)
        for row in rows(name, count)
    )  # fmt: skip


def test_parts_are_mixed_from_the_beginning_on():
    mixture = mixed(*parts([500, 500], [1, 1]), rewards=NAMES, seed=1)
    for start in range(0, 1_000, 100):
        some = Counter(row["reward"] for row in mixture[start : start + 100])
        assert 25 < some["math"] < 75


def test_the_mixture_depends_on_the_seed_alone():
    def questions(seed: int) -> list[str]:
        mixture = mixed(*parts([9, 4], [0.5, 0.5]), rewards=NAMES, seed=seed, num_rows=11)
        return [row["question"] for row in mixture]

    assert questions(1) == questions(1)
    assert questions(1) != questions(2)
    # Written down once: a run that is continued after an upgrade must not change its rows.
    assert questions(1)[:3] == ["math 3", "zebra 3", "math 6"]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.05, 5), min_size=3, max_size=3),
    num_rows=st.none() | st.integers(3, 200),
)
def test_any_mixture_has_its_shares_and_treats_the_rows_of_a_part_alike(
    lengths: list[int], weights: list[float], num_rows: int | None
):
    shares = weights[: len(lengths)]
    mixture = mixed(*parts(lengths, shares), rewards=NAMES, seed=3, num_rows=num_rows)
    assert num_rows is None or len(mixture) == num_rows
    counts = Counter(row["reward"] for row in mixture)
    times = Counter(row["question"] for row in mixture)
    for name, length, share in zip(NAMES, lengths, shares, strict=False):
        assert abs(counts[name] - len(mixture) * share / sum(shares)) < 1 + 1e-9
        of_part = [times[f"{name} {number}"] for number in range(length)]
        assert max(of_part) - min(of_part) <= 1
        assert num_rows is not None or min(of_part) >= 1


def test_the_rows_of_a_part_stay_as_they_are():
    [part] = parts([3], [1])
    mixture = mixed(part, rewards=NAMES, seed=1)
    assert part.rows == rows("math", 3)
    assert mixed(Part(rows=mixture, reward="math"), rewards=NAMES, seed=1)  # named already


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"share": 0.0}, r"Part 2 .*\(zebra\) has share=0.0; it must be above 0"),
        ({"share": float("nan")}, "share=nan"),
        ({"share": None}, "Give one to each, or to none"),
        ({"reward": "zebar"}, "Part 2 .* the reward 'zebar', and there are math, zebra, code"),
        ({"rows": []}, r"Part 2 .*\(zebra\) has no rows"),
        ({"rows": [{"question": "?", "reward": "math"}]}, "'reward' 'math' already.*'zebra'"),
        ({"share": 1e-9}, r"takes \d[\d,]+ rows until each is there once. .*num_rows"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_at_once(settings: dict, problem: str):
    good = {"rows": rows("zebra", 4), "reward": "zebra", "share": 0.5}
    with pytest.raises((ConfigError, DataError), match=problem):
        mixed(*parts([2], [0.5]), Part(**(good | settings)), rewards=NAMES, seed=1)


def test_a_mixture_of_nothing_or_of_too_few_rows_is_refused():
    with pytest.raises(ConfigError, match="no part"):
        mixed(rewards=NAMES, seed=1)
    with pytest.raises(ConfigError, match=r"num_rows=1.* less than a row for each part"):
        mixed(*parts([2, 2], [1, 1]), rewards=NAMES, seed=1, num_rows=1)


async def length_reward(text: str, row: Row) -> float:
    await asyncio.sleep(0)
    return len(text) / 100


REWARD = RewardByRow(
    {"math": math_reward, "zebra": zebra_reward, "code": code_reward, "length": length_reward}
)
REPLIES = {"DAPO": "math", "ZebraLogic, grid_mode": "zebra", "DeepCoder": "code"}


def load(folder: Path, kind: str) -> list[Row]:
    published = PUBLISHED[kind]
    path = folder / "rows.json"
    path.write_text(json.dumps([published.row]))
    required = ("question", "answer") if published.answer else ("question",)
    return load_rows(str(path), split="train", required=required)


def test_a_mixture_runs_through_workflow_and_executor_each_row_with_its_own_reward(tmp_path: Path):
    """With the real reward pool: three functions in workers, one on the loop."""
    loaded = {name: load(tmp_path, kind) for kind, name in REPLIES.items()}
    loaded["length"] = [{"question": "Say seven letters."}]
    found = [Part(rows=each, reward=name, share=1) for name, each in loaded.items()]
    mixture = mixed(*found, rewards=REWARD.rewards, seed=1)
    assert len(mixture) == 4

    def reply(conversation: str) -> str:
        for kind in REPLIES:
            if PUBLISHED[kind].question in conversation:
                return PUBLISHED[kind].right
        return "letters"

    workflow = SingleTurnWorkflow(
        byte_tokenizer(), REWARD, SamplingParams(max_new_tokens=200), group_size=2
    )
    config = RolloutConfig(prompts_per_step=4)
    with RolloutExecutor(ScriptedEngine(reply), workflow, mixture, config, seed=5) as rollouts:
        groups = rollouts.next_batch()
        assert not rollouts.take_lost()
    rewards = sorted(sample.reward for group in groups for sample in group)
    assert rewards == [0.07, 0.07, 1, 1, 1, 1, 1, 1]
