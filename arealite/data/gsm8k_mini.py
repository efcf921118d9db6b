"""Word problems in GSM8K's format, generated: what `arealite/gsm8k-mini` is made of.

    Today Tom has 3 apples. Then Tom has twice as many. Mia gives Tom 4 more. How many apples does
    Tom have now?

    <<3*2=6>>6
    <<6+4=10>>10
    #### 10

The words are few on purpose: each of them is one token of `arealite/tiny-math`.
"""

import random
from collections.abc import Collection
from functools import cache

from arealite.types import Row

NAMES = ("Tom", "Mia", "Sam", "Ann", "Ben")
THINGS = ("apples", "books", "coins", "cards")

STARTS = ("has", "finds", "buys")
GAINS = ("{other} gives {name} {n} more.", "{name} finds {n} more.", "{name} buys {n} more.")
LOSSES = ("{name} gives {n} to {other}.", "{name} loses {n}.", "{name} sells {n}.")
DOUBLINGS = ("{name} has twice as many.", "{name} buys as many again.")

_NUM_OPERATIONS = (2, 3)

_TEST_SEED, _NUM_TEST = 0, 200
_TRAIN_SEED, _NUM_TRAIN = 1, 8_000


def generate_problems(
    count: int,
    *,
    seed: int,
    exclude: Collection[str] = (),
    smallest: int = 1,
    largest: int = 9,
) -> list[Row]:
    """`count` rows with `question` and `answer`; no question twice, none that is in `exclude`.

    The same arguments give the same rows on every machine; a larger `count` only adds rows.

    Args:
        smallest: the least that is found or given away.
        largest: the most that somebody has at first, or finds.
    """
    source = random.Random(f"gsm8k-mini {seed}")
    taken = set(exclude)
    rows: list[Row] = []
    while len(rows) < count:
        row = _problem(source, smallest, largest)
        if row["question"] not in taken:
            taken.add(row["question"])
            rows.append(row)
    return rows


@cache
def held_out_questions() -> frozenset[str]:
    """Questions of the test split: what training must never see."""
    return frozenset(row["question"] for row in test_problems())


def train_problems() -> list[Row]:
    """The training split."""
    return generate_problems(_NUM_TRAIN, seed=_TRAIN_SEED, exclude=held_out_questions())


def test_problems() -> list[Row]:
    """The 200 problems of the test split."""
    return generate_problems(_NUM_TEST, seed=_TEST_SEED)


def _problem(source: random.Random, smallest: int, largest: int) -> Row:
    name, other = source.sample(NAMES, 2)
    thing = source.choice(THINGS)
    total = source.randint(smallest + 1, largest)
    sentences = [f"Today {name} {source.choice(STARTS)} {total} {thing}."]
    steps: list[str] = []
    for _ in range(source.choice(_NUM_OPERATIONS)):
        template, symbol, n = _operation(source, total, smallest, largest)
        sentence = template.format(name=name, other=other, n=n)
        sentences.append(f"Then {sentence}" if source.random() < 0.5 else sentence)
        result = {"+": total + n, "-": total - n, "*": total * n}[symbol]
        steps.append(f"<<{total}{symbol}{n}={result}>>{result}")
        total = result
    sentences.append(f"How many {thing} does {name} have now?")
    return {"question": " ".join(sentences), "answer": "\n".join([*steps, f"#### {total}"])}


def _operation(
    source: random.Random, total: int, smallest: int, largest: int
) -> tuple[str, str, int]:
    symbol = source.choice("+-*")
    if symbol == "-" and total > smallest:
        return source.choice(LOSSES), "-", source.randint(smallest, total - 1)
    if symbol == "*":
        return source.choice(DOUBLINGS), "*", 2
    return source.choice(GAINS), "+", source.randint(smallest, largest)
