import hashlib
import re

import pytest

from arealite.data import generate_problems, load_rows, load_tokenizer
from arealite.types import Row


@pytest.fixture(scope="module")
def problems() -> list[Row]:
    return generate_problems(2_000, seed=5)


def retell(question: str) -> int:
    """The number that is left, told from the question's sentences alone."""
    start, *sentences, asked = question.split(". ")
    found = re.fullmatch(r"Today (\w+) (?:has|finds|buys) (\d+) (\w+)", start)
    assert found
    name, total = found[1], int(found[2])
    assert asked == f"How many {found[3]} does {name} have now?"
    for sentence in sentences:
        words = sentence.removeprefix("Then ").split()
        number = next((int(word) for word in words if word.isdigit()), 0)
        if "twice" in words or "again" in words:
            total *= 2
        elif words[0] == name and words[1] in ("gives", "loses", "sells"):
            total -= number
        else:
            total += number
        assert total > 0
    return total


def test_the_last_line_is_what_the_question_tells(problems: list[Row]):
    for row in problems:
        assert row["answer"].splitlines()[-1] == f"#### {retell(row['question'])}"


def test_every_step_is_right_and_goes_on_from_the_one_before(problems: list[Row]):
    for row in problems:
        *steps, last = row["answer"].splitlines()
        assert len(steps) in (2, 3)
        previous = None
        for step in steps:
            found = re.fullmatch(r"<<(\d+)([+*-])(\d+)=(\d+)>>(\d+)", step)
            assert found and found[4] == found[5]
            left, right, result = int(found[1]), int(found[3]), int(found[4])
            assert {"+": left + right, "-": left - right, "*": left * right}[found[2]] == result
            assert previous in (None, left)
            previous = result
        assert last == f"#### {previous}"


def test_no_question_comes_twice_or_is_one_of_the_excluded(problems: list[Row]):
    excluded = {row["question"] for row in problems[:500]}
    fresh = generate_problems(1_500, seed=5, exclude=excluded)
    questions = [row["question"] for row in fresh]
    assert len(set(questions)) == 1_500
    assert not excluded & set(questions)
    assert fresh == problems[500:]


def test_the_test_split_is_never_trained_on():
    train = {row["question"] for row in load_rows("arealite/gsm8k-mini", split="train")}
    test = {row["question"] for row in load_rows("arealite/gsm8k-mini", split="test")}
    assert len(train) == 8_000
    assert len(test) == 200
    assert not train & test


def test_the_test_split_is_the_same_on_every_machine_and_in_every_release():
    rows = load_rows("arealite/gsm8k-mini", split="test")
    text = "\n".join(row["question"] for row in rows)
    assert rows[0]["question"] == (
        "Today Sam buys 2 cards. Then Mia gives Sam 3 more. Sam finds 4 more. Sam buys as many "
        "again. How many cards does Sam have now?"
    )
    assert rows[0]["answer"] == "<<2+3=5>>5\n<<5+4=9>>9\n<<9*2=18>>18\n#### 18"
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3999fba1baf9e261"


def test_the_embedded_tokenizer_gives_every_text_back_as_it_was(problems: list[Row]):
    tokenizer = load_tokenizer("arealite/tiny-math")
    for row in problems:
        for text in (row["question"], row["answer"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
