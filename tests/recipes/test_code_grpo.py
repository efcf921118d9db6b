import re
from pathlib import Path

import pytest

from arealite.data import TINY_PROGRAMS, load_rows
from recipes import code_grpo
from tests.recipes.scripted import NUM_ROWS, run_with_policy


def test_programs_are_rewarded_for_what_they_print(tmp_path: Path):
    rows = [row for split in ("train", "test") for row in load_rows(TINY_PROGRAMS, split=split)]
    programs = {row["question"]: row["answer"] for row in rows}

    def forget_int_when_one_number_is_read(conversation: str) -> str:
        [question] = re.findall(r"<\|user\|>(.*?)<\|end\|>", conversation)
        program = programs[question]
        if program.count("input()") == 1:
            program = program.replace("int(input())", "input()")
        return f"```python\n{program}\n```"

    figures = run_with_policy(code_grpo, forget_int_when_one_number_is_read, tmp_path / "run")
    test_rows = load_rows(TINY_PROGRAMS, split="test")[:NUM_ROWS]
    num_right = sum(row["answer"].count("input()") > 1 for row in test_rows)
    assert 0 < num_right < NUM_ROWS
    assert figures["eval/reward"] == pytest.approx(num_right / NUM_ROWS)
