"""Pairs of answers: the chosen one is right, the rejected one is not."""

from arealite.data import GSM8K_MINI, MINI_PREFERENCES, load_rows
from arealite.rewards.math import gsm8k_reward

REQUIRED = ("question", "chosen", "rejected")


def test_the_chosen_answer_is_right_and_the_rejected_one_is_not():
    for split in ("train", "test"):
        for row in load_rows(MINI_PREFERENCES, split=split, required=REQUIRED):
            assert gsm8k_reward(row["chosen"], row) == 1.0
            assert gsm8k_reward(row["rejected"], row) == 0.0


def test_no_test_question_is_trained_on():
    questions = {row["question"] for row in load_rows(MINI_PREFERENCES, split="train")}
    assert not questions & {row["question"] for row in load_rows(GSM8K_MINI, split="test")}
