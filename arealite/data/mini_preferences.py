"""Pairs of answers to the problems of `arealite/gsm8k-mini`: what `arealite/mini-preferences` is.

The chosen answer works the problem out, the rejected one gives a wrong number at once:

    question   Today Tom has 3 apples. Then Tom has twice as many. ...
    chosen     <<3*2=6>>6 ...
               #### 10
    rejected   #### 11
"""

import random

from arealite.data import gsm8k_mini
from arealite.types import Row

_NUM_TRAIN = 1_000


def train_pairs() -> list[Row]:
    """The training split."""
    return [_pair(row) for row in gsm8k_mini.train_problems()[:_NUM_TRAIN]]


def test_pairs() -> list[Row]:
    """The 200 problems of the test split, with a pair each."""
    return [_pair(row) for row in gsm8k_mini.test_problems()]


def _pair(row: Row) -> Row:
    """The same row has the same pair on every machine."""
    source = random.Random(row["question"])
    right = int(row["answer"].rpartition("#### ")[2])
    wrong = source.choice([n for n in range(max(0, right - 3), right + 4) if n != right])
    return {
        "question": row["question"],
        "chosen": row["answer"],
        "rejected": f"#### {wrong}",
        "answer": row["answer"],
    }
