"""Admission at length: many more runs on a virtual clock, and every interleaving of larger ones."""

import time

import pytest
from hypothesis import given, settings

from tests.rollout.test_admission import BOOKS, ORDERS, check_the_books
from tests.rollout.test_admission_exhaustively import Scope, explore
from tests.rollout.virtual_runs import Setting

pytestmark = pytest.mark.soak


@settings(max_examples=10_000, deadline=None)
@given(**BOOKS)
def test_the_books_balance_in_ten_thousand_runs(
    setting: Setting, kill_after: list[int], ranks_after: int
):
    check_the_books(setting, kill_after, ranks_after)


LARGE_SCOPES = [
    *(Scope(order=order, max_staleness=2, max_running=6, max_lost=2) for order in ORDERS),
    Scope(order="fifo", batch=3, max_staleness=2, max_running=9),
    Scope(order="fifo", max_staleness=4, max_running=4),
    Scope(order="window", max_staleness=4, max_running=4),
    Scope(order="window", batch=3, max_staleness=4, max_running=8),
    Scope(order="ready", batch=1, max_staleness=4, max_running=5),
    Scope(order="ready", batch=3, max_running=6),
    Scope(order="ready", max_staleness=3, max_running=3),
    Scope(order="fifo", batch=1, max_staleness=2, ranks=2),
    Scope(order="fifo", max_running=3, ranks=2),
    Scope(order="window", max_running=4, ranks=2),
    Scope(order="ready", max_running=4, ranks=2, can_be_killed=False),
    Scope(order="fifo", batch=1, max_staleness=0, max_running=1, ranks=3),
    Scope(order="ready", batch=1, max_running=2, ranks=3, can_be_killed=False),
]
"""Of what ends within two minutes; of several ranks with `ready`, a kill has no end of states."""


@pytest.mark.parametrize("scope", LARGE_SCOPES, ids=str)
def test_every_interleaving_of_a_larger_run_keeps_the_invariants(
    scope: Scope, capsys: pytest.CaptureFixture[str]
):
    began_s = time.monotonic()
    num_states = explore(scope)
    with capsys.disabled():
        print(f"\n{scope!s:>60}: {num_states:>9,} states in {time.monotonic() - began_s:5.1f} s")
