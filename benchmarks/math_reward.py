"""How often `math_reward` is right on its labelled pairs, and how long it takes.

    python benchmarks/math_reward.py

Each pair is graded a few times after one that loads the parser; a pair's time is the worst of them.
The last line is JSON: the share that is graded as labelled, milliseconds that half of the pairs, 99
in a hundred, and all of them stay below, and the same for answers made to take long.
"""

import json
import sys
import time
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))

from arealite.rewards.math import math_reward
from tests.rewards.math_corpus import HOSTILE, RIGHT, WRONG

REPEATS = 5
GOLD_OF_HOSTILE = ("5", r"\frac{1}{2}", "[0,1]")
Pair = tuple[str, str]


def milliseconds(pair: Pair) -> float:
    """The longest of some times."""
    gold, answer = pair
    times_ms = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        math_reward(rf"So it is \boxed{{{answer}}}.", {"answer": gold})
        times_ms.append(1000 * (time.perf_counter() - began_s))
    return max(times_ms)


def disagreements() -> list[Pair]:
    """The pairs that are graded against their label."""
    labelled = [(pair, 1.0) for pair in RIGHT] + [(pair, 0.0) for pair in WRONG]
    return [
        (gold, answer)
        for (gold, answer), label in labelled
        if math_reward(rf"\boxed{{{answer}}}", {"answer": gold}) != label
    ]


def main() -> None:
    pairs = RIGHT + WRONG
    found = disagreements()
    for gold, answer in found:
        print(f"graded against its label: {answer} for {gold}")
    times_ms = [milliseconds(pair) for pair in pairs]
    hostile_ms = [milliseconds((gold, answer)) for gold in GOLD_OF_HOSTILE for answer in HOSTILE]
    figures = {
        "pairs": len(pairs),
        "right": round(1 - len(found) / len(pairs), 4),
        "p50_ms": round(quantiles(times_ms, n=100)[49], 1),
        "p99_ms": round(quantiles(times_ms, n=100)[98], 1),
        "max_ms": round(max(times_ms), 1),
        "hostile_max_ms": round(max(hostile_ms), 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
