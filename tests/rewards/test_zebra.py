import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.errors import RewardError
from arealite.rewards.zebra import zebra_cell_share, zebra_reward

HOUSES = {
    "House 1": {"Name": "Bo", "Drink": "root beer"},
    "House 2": {"Name": "Ada", "Drink": "tea"},
}
GRID = {"answer": json.dumps(HOUSES)}
RIGHT = json.dumps({"solution": HOUSES})
HALF = json.dumps({"solution": {"House 1": HOUSES["House 1"]}})
CHOICES = {"choices": ["tea", "root beer", "milk"], "answer": "root beer"}


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,
        json.dumps(HOUSES),
        json.dumps({"reasoning": "Bo is {left}.\n", "solution": HOUSES}, indent=4),
        f"I try {HALF} first, but no:\n```json\n{RIGHT}\n```\nThat is it.",
        f"The set {{x | x < 2}} and an open {{ brace.\n{RIGHT}",
        RIGHT.replace("Bo", " bo ").replace("Name", "name").replace("root beer", "Root  Beer"),
        '{"reasoning": "first line\nsecond line", "solution": ' + json.dumps(HOUSES) + "}",
        RIGHT + ' {"solution": unfinished',
    ],
    ids=range(8),
)
def test_a_table_with_each_cell_right_is_worth_1(text: str):
    assert zebra_reward(text, GRID) == zebra_cell_share(text, GRID) == 1.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("Bo drinks root beer, Ada drinks tea.", 0.0),
        (HALF, 0.5),
        (RIGHT.replace("Ada", "Bo"), 0.75),
        (f"{RIGHT}\nNo, rather:\n{HALF}", 0.5),
        (RIGHT[:-3], 0.0),  # cut off
        (json.dumps({"solution": "House 1: Bo"}), 0.0),
        (json.dumps({"solution": {"House 1": "Bo", "House 2": ["Ada"]}}), 0.0),
        (json.dumps({"solution": {"House 1": {"Name": ["Bo"], "Drink": None}}}), 0.0),
        ('{"House 1": ' * 2_000, 0.0),
        ('{"solution": ' + "[" * 100_000, 0.0),
    ],
    ids=range(11),
)
def test_a_table_with_a_wrong_cell_is_worth_0_or_its_share(text: str, share: float):
    assert zebra_cell_share(text, GRID) == share
    assert zebra_reward(text, GRID) == 0.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"so \boxed{root beer}", 1.0),
        (r"so \boxed{\text{Root Beer}}", 1.0),
        (r"so \boxed{B}", 1.0),
        ("#### (b)", 1.0),
        (r"\boxed{tea}, no: \boxed{B}", 1.0),
        (r"\boxed{A}", 0.0),
        (r"\boxed{Z}", 0.0),
        (r"\boxed{beer}", 0.0),
        ("It is root beer.", 0.0),
        ("", 0.0),
    ],
)
def test_a_choice_may_be_told_by_its_words_or_its_letter(text: str, reward: float):
    assert zebra_reward(text, CHOICES) == zebra_cell_share(text, CHOICES) == reward


@given(
    st.text()
    | st.lists(
        st.sampled_from(['{"solution":', '{"House 1":', "{", "}", '"Bo"', ":", "[", "\\"])
    ).map(" ".join)
)
def test_any_text_has_a_reward(text: str):
    assert zebra_reward(text, GRID) == 0.0
    assert 0.0 <= zebra_cell_share(text, GRID) < 1.0
    assert zebra_reward(text, CHOICES) == 0.0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "'answer' is None.*JSON"),
        ({"answer": "Bo"}, "'answer' is 'Bo'.*JSON"),
        ({"answer": "[1]"}, "as load_rows makes it"),
        ({"answer": 5}, "'answer' is 5"),
        ({"choices": ["tea"], "answer": "milk"}, "'milk', which is none of its 'choices'"),
    ],
)
def test_a_row_without_a_solution_raises_instead_of_scoring_zero(row: dict, problem: str):
    with pytest.raises(RewardError, match=problem):
        zebra_reward(RIGHT, row)
