import json
from itertools import count
from pathlib import Path

from arealite.data import TINY_PROGRAMS, load_rows
from arealite.observe.metrics import read_metrics
from recipes import code_ppo
from tests.recipes.scripted import run_with_policy


def test_it_trains_on_groups_of_right_and_wrong_programs(tmp_path: Path):
    rows = [row for split in ("train", "test") for row in load_rows(TINY_PROGRAMS, split=split)]
    programs = {row["question"]: row["answer"] for row in rows}
    calls = count()

    def right_every_other_time(conversation: str) -> str:
        question = conversation.partition("<|user|>")[2].partition("<|end|>")[0]
        program = "print()" if next(calls) % 2 else programs[question]
        return f"```python\n{program}\n```"

    run_with_policy(code_ppo, right_every_other_time, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    rewards = [(line["reward"], line["raw_reward"]) for line in lines]
    assert sorted(rewards) == [(-5.0, 0.0)] * 4 + [(5.0, 1.0)] * 4  # two steps of two groups of two
    steps = read_metrics(tmp_path).values()  # a group counts in the step in which it is finished
    assert sum(step.get("groups/sampled", 0) for step in steps) >= 4
