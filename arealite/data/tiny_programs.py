"""Small programming tasks with their tests, generated: what `arealite/tiny-programs` is made of.

    Read two numbers. Take their sum. Multiply it by 3. Print it.

    a = int(input())
    b = int(input())
    r = a + b
    r = r * 3
    print(r)

The sentences are few on purpose: each of their words is one token of `arealite/tiny-agent`.
"""

import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from arealite.types import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One sentence of a task, and the Python that does what it says."""

    sentence: str
    expression: str
    compute: Callable[[list[int]], int]
    """From the numbers that the expression names, the value that it has to have."""


VARIABLES = ("a", "b", "c")
READS = ("Read a number.", "Read two numbers.", "Read three numbers.")

_NUM_TESTS = 3
_TEST_SEED, _NUM_TEST = 0, 200
_TRAIN_SEED, _NUM_TRAIN = 1, 2_000


def generate_programs(count: int, *, seed: int, exclude: Collection[str] = ()) -> list[Row]:
    """`count` rows with `question`, `answer` (a right program) and `tests`; no question twice.

    A test is an object of `input` and `output`: what the program reads, and what it has to print.
    The same arguments give the same rows on every machine; a larger `count` only adds rows.
    """
    source = random.Random(f"tiny-programs {seed}")
    taken = set(exclude)
    rows: list[Row] = []
    while len(rows) < count:
        row = _task(source)
        if row["question"] not in taken:
            taken.add(row["question"])
            rows.append(row)
    return rows


def train_programs() -> list[Row]:
    """The training split."""
    held_out = {row["question"] for row in test_programs()}
    return generate_programs(_NUM_TRAIN, seed=_TRAIN_SEED, exclude=held_out)


def test_programs() -> list[Row]:
    """The 200 tasks of the test split."""
    return generate_programs(_NUM_TEST, seed=_TEST_SEED)


def _task(source: random.Random) -> Row:
    names = VARIABLES[: source.randint(1, len(VARIABLES))]
    steps = [_combination(source, names)] if len(names) > 1 else []
    steps.append(_change(source, "r" if steps else "a"))
    if source.random() < 0.5:
        steps.append(_change(source, "r"))
    reads = [f"{name} = int(input())" for name in names]
    lines = [*reads, *(f"r = {step.expression}" for step in steps), "print(r)"]
    sentences = [READS[len(names) - 1], *(step.sentence for step in steps), "Print it."]
    return {
        "question": " ".join(sentences),
        "answer": "\n".join(lines),
        "tests": [_test(source, len(names), steps, index) for index in range(_NUM_TESTS)],
    }


def _combination(source: random.Random, names: tuple[str, ...]) -> Step:
    """What makes one number of several."""
    listed = ", ".join(names)
    steps = [
        Step(sentence="Take their sum.", expression=" + ".join(names), compute=sum),
        Step(sentence="Take their product.", expression=" * ".join(names), compute=math.prod),
        Step(sentence="Take the largest.", expression=f"max({listed})", compute=max),
        Step(sentence="Take the smallest.", expression=f"min({listed})", compute=min),
        Step(
            sentence="Take the first minus the second.",
            expression="a - b",
            compute=lambda numbers: numbers[0] - numbers[1],
        ),
    ]
    return source.choice(steps)


def _change(source: random.Random, name: str) -> Step:
    """What makes another number of one."""
    n = source.randint(2, 9)
    steps = [
        Step(
            sentence=f"Add {n}.",
            expression=f"{name} + {n}",
            compute=lambda numbers: numbers[0] + n,
        ),
        Step(
            sentence=f"Subtract {n}.",
            expression=f"{name} - {n}",
            compute=lambda numbers: numbers[0] - n,
        ),
        Step(
            sentence=f"Multiply it by {n}.",
            expression=f"{name} * {n}",
            compute=lambda numbers: numbers[0] * n,
        ),
        Step(
            sentence="Square it.",
            expression=f"{name} * {name}",
            compute=lambda numbers: numbers[0] ** 2,
        ),
    ]
    return source.choice(steps)


def _test(source: random.Random, num_inputs: int, steps: list[Step], index: int) -> dict[str, str]:
    # One of them has one digit, another one in each test: as text, 9 is larger than 10.
    numbers = [source.randint(10, 99) for _ in range(num_inputs)]
    numbers[index % num_inputs] = source.randint(2, 9)
    values = numbers
    for step in steps:
        values = [step.compute(values)]
    return {
        "input": "".join(f"{number}\n" for number in numbers),
        "output": f"{values[0]}\n",
    }
