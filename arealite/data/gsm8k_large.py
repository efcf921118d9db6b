"""The word problems of gsm8k-mini with large numbers: what `arealite/gsm8k-large` is made of.

    Today Tom has 384 apples. Then Tom has twice as many. Mia gives Tom 512 more. How many apples
    does Tom have now?

A model as small as the embedded ones cannot compute with such numbers. It can copy them, and so
leave the computing to a tool.
"""

from collections.abc import Collection

from arealite.data.gsm8k_mini import generate_problems
from arealite.types import Row

_SMALLEST, _LARGEST = 100, 999

_TEST_SEED, _NUM_TEST = 0, 200
_TRAIN_SEED, _NUM_TRAIN = 1, 8_000


def generate_large_problems(count: int, *, seed: int, exclude: Collection[str] = ()) -> list[Row]:
    """`generate_problems` with numbers of three digits; results have up to four."""
    return generate_problems(
        count, seed=seed, exclude=exclude, smallest=_SMALLEST, largest=_LARGEST
    )


def train_problems() -> list[Row]:
    """The training split."""
    held_out = {row["question"] for row in test_problems()}
    return generate_large_problems(_NUM_TRAIN, seed=_TRAIN_SEED, exclude=held_out)


def test_problems() -> list[Row]:
    """The 200 problems of the test split."""
    return generate_large_problems(_NUM_TEST, seed=_TEST_SEED)
