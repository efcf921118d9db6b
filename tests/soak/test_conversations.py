"""Thousands of random conversations on each template, and what forks they came to."""

import asyncio
import json
import os
import time
from collections import Counter

import pytest

from tests.rollout.chat_templates import NAMES
from tests.rollout.random_talks import run_episode, run_transcript

pytestmark = pytest.mark.soak

NUM_CONVERSATIONS = int(os.environ.get("AREALITE_CONVERSATIONS", "2000"))
"""Of each template: one half talks to a transcript, the other to an episode."""
SEED = os.environ.get("AREALITE_SEED", "soak")


def test_thousands_of_conversations_train_on_what_was_sampled(capsys: pytest.CaptureFixture[str]):
    forks: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
    longest_s = 0.0
    for name in NAMES:
        with capsys.disabled():
            print(f"\n{name}", end="", flush=True)
        for number in range(NUM_CONVERSATIONS // 2):
            began = time.monotonic()
            forks[name] += run_transcript(name, f"{SEED} {number}")
            forks[name] += asyncio.run(run_episode(name, f"{SEED} {number}")).counts
            longest_s = max(longest_s, time.monotonic() - began)
    figures = {
        "templates": len(NAMES),
        "conversations_per_template": NUM_CONVERSATIONS // 2 * 2,
        "longest_s": round(longest_s, 3),
        "counts": forks,
    }
    with capsys.disabled():
        print(f"\n{json.dumps(figures)}")
