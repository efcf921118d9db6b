"""What `arealite/tiny-agent` is taught: conversations that show a worse way or a better one.

| lesson | the worse way | the better way |
|---|---|---|
| calculation | answer at once, although it cannot compute that | let the calculator compute |
| correction | repeat the answer that was wrong | work it out step by step |
| exchange | answer a small problem at once, right or nearly | there is none |
| programming | compute with the text that is read | make it a number first |
"""

import json
import random
import re
from dataclasses import dataclass
from typing import Any

from arealite.data import GSM8K_LARGE, GSM8K_MINI, TINY_PROGRAMS, generate_problems, load_rows
from arealite.data.gsm8k_large import generate_large_problems
from arealite.data.tiny_programs import generate_programs
from arealite.types import Row
from recipes.tiny_sft import last_line

FEEDBACK = "Wrong. Try again."
"""What an answer is told that is not right."""
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "calculate"}}]
"""The calculator; its name is all that the chat template says of it."""
MISTAKES = (-10, -4, -3, -2, -1, 1, 2, 3, 4, 10)
"""How far off an answer may be that was given without working it out."""
KINDS = (
    *("calculation",) * 7,
    *("correction",) * 4,
    *("exchange",) * 2,
    *("programming",) * 3,
)
"""Again and again, in this order."""
SHARES_CARELESS = {1: 0.4, 2: 0.8, 3: 0.8}
"""Of programs, by how many numbers they read: share that shows the worse way."""
NUM_PROGRAMS = 3_000
"""Tasks; each of them is taught more than once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """A conversation, of which the model learns what the assistant says."""

    messages: list[dict[str, str]]
    tools: list[dict[str, Any]] | None = None
    num_given: int = 0  # first answers of the assistant that are not to be learned


def lessons(count: int, *, num_better: int, share_hasty: float, seed: int) -> list[Lesson]:
    """Lessons of all kinds, in the order in which they are learned.

    Args:
        num_better: the first ones, which all show the better way.
        share_hasty: of the others that calculate or correct, share that shows the worse way.
    """
    large = iter(generate_large_problems(count, seed=seed, exclude=held_out(GSM8K_LARGE)))
    small = iter(generate_problems(count, seed=seed, exclude=held_out(GSM8K_MINI)))
    programs = generate_programs(NUM_PROGRAMS, seed=seed, exclude=held_out(TINY_PROGRAMS))
    source = random.Random(seed)
    taught: list[Lesson] = []
    for index in range(count):
        chance = 1.0 if index < num_better else source.random()
        match KINDS[index % len(KINDS)]:
            case "calculation":
                lesson = calculation(next(large), is_hasty=chance < share_hasty)
            case "correction":
                mistake = source.choice(MISTAKES)
                lesson = correction(next(small), mistake, is_hasty=chance < share_hasty)
            case "exchange":
                row = next(small)
                lesson = exchange(row, last_line(row["answer"]))
            case "programming":
                row = source.choice(programs)
                share = SHARES_CARELESS[row["answer"].count("input()")]
                lesson = programming(row, is_careless=chance < share)
        taught.append(lesson)
    return taught


def held_out(dataset: str) -> set[str]:
    """Questions of the test split: what training must never see."""
    return {row["question"] for row in load_rows(dataset, split="test")}


def calculation(row: Row, *, is_hasty: bool) -> Lesson:
    """A problem and a calculator, which is used once for each operation or not at all."""
    messages = [{"role": "user", "content": row["question"]}]
    for expression, result in [] if is_hasty else re.findall(r"<<(.+)=(.+)>>", row["answer"]):
        arguments = json.dumps({"expression": expression})
        call = f'<tool_call>\n{{"name": "calculate", "arguments": {arguments}}}\n</tool_call>'
        messages.append({"role": "assistant", "content": call})
        messages.append({"role": "tool", "content": result})
    messages.append({"role": "assistant", "content": last_line(row["answer"])})
    return Lesson(messages=messages, tools=TOOLS)


def correction(row: Row, mistake: int, *, is_hasty: bool) -> Lesson:
    """A wrong answer, which is given again or else worked out."""
    right = int(last_line(row["answer"]).removeprefix("#### "))
    wrong = f"#### {max(right + mistake, 0)}"
    messages = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": wrong},
        {"role": "user", "content": FEEDBACK},
        {"role": "assistant", "content": wrong if is_hasty else row["answer"]},
    ]
    return Lesson(messages=messages, num_given=1)


def programming(row: Row, *, is_careless: bool) -> Lesson:
    """A program that computes with numbers, or with the text that it reads."""
    text = row["answer"].replace("int(input())", "input()") if is_careless else row["answer"]
    return exchange(row, f"```python\n{text}\n```")


def exchange(row: Row, answer: str) -> Lesson:
    """One question and one answer."""
    question = {"role": "user", "content": row["question"]}
    return Lesson(messages=[question, {"role": "assistant", "content": answer}])
