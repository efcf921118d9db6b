import hashlib
import io
from contextlib import redirect_stdout
from unittest.mock import patch

import pytest

from arealite.data import TINY_PROGRAMS, load_rows, load_tokenizer
from arealite.data.tiny_programs import generate_programs
from arealite.types import Row


@pytest.fixture(scope="module")
def tasks() -> list[Row]:
    return generate_programs(1_000, seed=5)


def run(program: str, given: str) -> str:
    """What a program of ours prints; they do nothing that needs a sandbox."""
    printed = io.StringIO()
    with patch("sys.stdin", io.StringIO(given)), redirect_stdout(printed):
        exec(program, {})
    return printed.getvalue()


def passes(program: str, row: Row) -> bool:
    try:
        return all(run(program, test["input"]) == test["output"] for test in row["tests"])
    except (TypeError, ValueError):
        return False


def test_the_program_of_a_row_passes_its_tests(tasks: list[Row]):
    assert all(passes(row["answer"], row) for row in tasks)


def test_a_program_that_computes_with_text_does_not(tasks: list[Row]):
    careless = [row["answer"].replace("int(input())", "input()") for row in tasks]
    assert not any(passes(program, row) for program, row in zip(careless, tasks, strict=True))


def test_a_program_with_another_operator_nearly_never_does(tasks: list[Row]):
    """Such as the smallest for the largest: numbers of one and two digits tell them apart."""
    for one, other in ((" + ", " * "), (" - ", " + "), ("max", "min"), ("a - b", "b - a")):
        # A square does not tell which of two numbers was taken from the other.
        changed = [row for row in tasks if one in row["answer"] and "r * r" not in row["answer"]]
        passed = sum(passes(row["answer"].replace(one, other, 1), row) for row in changed)
        assert len(changed) > 50
        assert passed / len(changed) < 0.02


def test_the_question_says_what_the_program_does():
    question = "Read two numbers. Take their sum. Multiply it by 4. Print it."
    [row] = [row for row in generate_programs(100, seed=5) if row["question"] == question]
    assert row == {
        "question": question,
        "answer": "a = int(input())\nb = int(input())\nr = a + b\nr = r * 4\nprint(r)",
        "tests": [
            {"input": "4\n39\n", "output": "172\n"},
            {"input": "20\n4\n", "output": "96\n"},
            {"input": "2\n98\n", "output": "400\n"},
        ],
    }


def test_no_task_comes_twice_or_is_one_of_the_excluded(tasks: list[Row]):
    excluded = {row["question"] for row in tasks[:300]}
    fresh = generate_programs(700, seed=5, exclude=excluded)
    questions = {row["question"] for row in fresh}
    assert len(questions) == 700
    assert not excluded & questions


def test_the_test_split_is_never_trained_on_and_the_same_in_every_release():
    train = {row["question"] for row in load_rows(TINY_PROGRAMS, split="train")}
    rows = load_rows(TINY_PROGRAMS, split="test")
    assert len(train) == 2_000
    assert len(rows) == 200
    assert not train & {row["question"] for row in rows}
    text = "\n".join(row["question"] + str(row["tests"]) for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "65adc853f688379a"


def test_the_embedded_agent_gives_every_text_back_as_it_was(tasks: list[Row]):
    tokenizer = load_tokenizer("arealite/tiny-agent")
    for row in tasks:
        for text in (row["question"], f"```python\n{row['answer']}\n```"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
