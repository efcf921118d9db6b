import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.data import GSM8K_LARGE, load_rows
from recipes import gsm8k_agent
from recipes.gsm8k_agent import calculate
from tests.recipes.scripted import NUM_ROWS, run_with_policy

CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "%s"}}\n</tool_call>'


@given(numbers=st.lists(st.integers(0, 99_999), min_size=1, max_size=8), data=st.data())
def test_the_calculator_agrees_with_python(numbers: list[int], data: st.DataObject):
    expression = str(numbers[0])
    for number in numbers[1:]:
        symbol = data.draw(st.sampled_from(["+", "-", " * ", "*-"]))
        expression = f"({expression}){symbol}{number}"
    assert calculate(expression) == str(eval(expression))


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            "()",
            "(",
            "2+",
            "2 3",
            "012",
            "9**9",
            "2//1",
            "7/2",
            "1.5",
            "1e9",
            "0x10",
            "9" * 101,
        ),
        *("a", "True", "x:=1", "9(9)", "(1,2)", "[1]", "'1'*9", "__import__('os')", "1if 1else 1"),
    ],
)
def test_the_calculator_refuses_whatever_is_not_made_of_whole_numbers(expression: str):
    with pytest.raises((ValueError, SyntaxError)):
        calculate(expression)


def test_an_agent_that_leaves_each_operation_to_the_calculator_is_right(tmp_path: Path):
    rows = [row for split in ("train", "test") for row in load_rows(GSM8K_LARGE, split=split)]
    answers = {row["question"]: row["answer"] for row in rows}

    def leave_it_to_the_calculator(conversation: str) -> str:
        question = re.findall(r"<\|user\|>(.*?)<\|end\|>", conversation)[0]
        operations = re.findall(r"<<(.+)=(.+)>>", answers[question])
        results = re.findall(r"<\|tool\|>(.*?)<\|end\|>", conversation)
        if len(results) < len(operations):
            return CALL % operations[len(results)][0]
        return f"#### {results[-1]}"

    figures = run_with_policy(gsm8k_agent, leave_it_to_the_calculator, tmp_path / "run")
    test_rows = load_rows(GSM8K_LARGE, split="test")[:NUM_ROWS]
    num_operations = sum(row["answer"].count("<<") for row in test_rows)
    assert figures["eval/reward"] == figures["rollout/reward"] == 1.0
    assert figures["eval/tool_calls"] == pytest.approx(num_operations / len(test_rows))
    assert 2 <= figures["rollout/tool_calls"] <= 3
