"""`math_reward` on labelled pairs: fractions, sets, intervals, matrices, units, words."""

import pytest

from arealite.errors import RewardError
from arealite.rewards.math import math_reward
from tests.rewards.math_corpus import DISAGREEMENTS, HOSTILE, RIGHT, WRONG


def grade(gold: str, answer: str) -> float:
    return math_reward(rf"So it is \boxed{{{answer}}}.", {"answer": gold})


def test_the_corpus_is_graded_as_it_is_labelled():
    labelled = [(pair, 1.0) for pair in RIGHT] + [(pair, 0.0) for pair in WRONG]
    found = {pair for pair, label in labelled if grade(*pair) != label}
    assert found == DISAGREEMENTS
    assert len(labelled) >= 200 and len(found) <= 0.02 * len(labelled)


def test_a_row_of_math_has_its_answer_in_the_solution():
    row = {"problem": "1/2 + 1/3?", "solution": r"We get $\frac{5}{6}$: $\boxed{\frac56}$."}
    assert math_reward(r"\boxed{\dfrac{5}{6}}", row) == 1.0
    assert math_reward(r"\boxed{\dfrac{1}{6}}", row) == 0.0
    with pytest.raises(RewardError, match="no 'answer' to compare with"):
        math_reward("\\boxed{1}", {"problem": "1?"})


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("gold", ["5", r"\text{east}", "[0,1]", r"\frac{1}{2}"])
def test_hostile_answers_are_wrong_and_no_error(
    gold: str, answer: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("arealite.rewards.math.MAX_CPU_S", 0.2)
    assert grade(gold, answer) == 0.0
