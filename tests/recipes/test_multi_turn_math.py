import re
from pathlib import Path

import pytest

from arealite.data import GSM8K_MINI, load_rows
from recipes import multi_turn_math
from tests.recipes.scripted import run_with_policy


def test_what_is_right_only_after_feedback_is_worth_a_little_less(tmp_path: Path):
    rows = [row for split in ("train", "test") for row in load_rows(GSM8K_MINI, split=split)]
    answers = {row["question"]: row["answer"] for row in rows}

    def correct_itself(conversation: str) -> str:
        question, *feedback = re.findall(r"<\|user\|>(.*?)<\|end\|>", conversation)
        assert feedback in ([], ["Wrong. Try again."])
        return answers[question] if feedback else "#### 0"

    figures = run_with_policy(multi_turn_math, correct_itself, tmp_path / "run")
    assert figures["eval/reward_turn_1"] == 0.0
    assert figures["eval/reward_turn_2"] == figures["rollout/raw_reward"] == 1.0
    assert figures["eval/reward"] == pytest.approx(0.9)
    assert figures["rollout/reward"] == pytest.approx(0.9)
    assert figures["rollout/turns"] == 2.0
