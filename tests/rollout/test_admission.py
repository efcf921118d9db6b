"""The state machine of admission, by hand and in whole runs on a virtual clock."""

import random
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.rollout.admission import Admission, Order, Ticket, merge_cursors
from arealite.types import Cursor
from tests.rollout.virtual_runs import Setting, VirtualRun, play, settings_of

ORDERS: tuple[Order, ...] = ("fifo", "window", "ready")


def admission(**overrides: object) -> Admission[str]:
    settings: dict = {"batch": 2, "max_staleness": 1, "max_running": 100, "start": Cursor()}
    return Admission[str](**(settings | overrides))


def start_all(machine: Admission[str], version: int) -> list[Ticket]:
    tickets = []
    while ticket := machine.start(version):
        assert ticket not in tickets
        tickets.append(ticket)
    return tickets


def finish(machine: Admission[str], tickets: list[Ticket], *places: int) -> None:
    """Let the episodes of these places end in this order; their groups are named by them."""
    for place in places:
        ticket = next(ticket for ticket in tickets if ticket.place == place)
        assert machine.accept(ticket, str(place))


def places(tickets: list[Ticket]) -> list[int]:
    return [ticket.place for ticket in tickets]


def test_synchronous_training_starts_one_batch_per_version():
    machine = admission(max_staleness=0)
    tickets = start_all(machine, version=0)
    assert tickets == [Ticket(place=0, version=0), Ticket(place=1, version=0)]
    finish(machine, tickets, 0, 1)
    assert machine.take() == ["0", "1"]
    assert start_all(machine, version=0) == []  # these weights are still in training
    assert places(start_all(machine, version=1)) == [2, 3]


@pytest.mark.parametrize(
    ("order", "num_at_once", "num_while_training"),
    [("fifo", 6, 4), ("window", 4, 2), ("ready", 6, 4)],
)
def test_as_many_start_as_may_still_be_in_time(
    order: Order, num_at_once: int, num_while_training: int
):
    machine = admission(order=order, max_staleness=2)
    tickets = start_all(machine, version=0)
    assert len(tickets) == num_at_once
    finish(machine, tickets, *range(num_at_once))
    assert machine.take() == ["0", "1"]
    assert num_at_once - 2 == num_while_training and start_all(machine, version=0) == []
    assert len(start_all(machine, version=1)) == 2


def test_a_window_of_one_group_runs_ahead_nevertheless():
    assert len(start_all(admission(order="window", batch=1), version=0)) == 2


@pytest.mark.parametrize("order", ["fifo", "ready"])
def test_nothing_starts_under_weights_that_are_too_old_for_the_next_step(order: Order):
    machine = admission(order=order)
    finish(machine, start_all(machine, version=0), 0, 1, 2, 3)
    assert machine.take() == ["0", "1"]
    assert machine.take() == ["2", "3"]
    assert start_all(machine, version=0) == []  # step 2 takes nothing older than version 1
    assert len(start_all(machine, version=1)) == 2


def test_the_limit_of_running_episodes_holds():
    machine = admission(max_running=3)
    tickets = start_all(machine, version=0)
    assert places(tickets) == [0, 1, 2]
    finish(machine, tickets, 0)
    assert places(start_all(machine, version=0)) == [3]


def test_fifo_gives_a_batch_in_the_order_of_the_rows_once_it_is_complete():
    machine = admission()
    tickets = start_all(machine, version=0)
    finish(machine, tickets, 1, 2)
    assert machine.take() is None
    finish(machine, tickets, 0)
    assert machine.take() == ["0", "1"]
    assert machine.take() is None
    finish(machine, tickets, 3)
    assert machine.take() == ["2", "3"]


def test_fifo_does_not_look_behind_the_next_batch():
    machine = admission(max_staleness=2)
    tickets = start_all(machine, version=0)
    finish(machine, tickets, 0, 1, 5)
    assert machine.take() == ["0", "1"]


def test_a_lost_row_is_replaced_by_those_behind_it():
    machine = admission(max_staleness=0)
    tickets = start_all(machine, version=0)
    assert machine.lose(tickets[0])
    late = start_all(machine, version=0)
    assert late == [Ticket(place=2, version=0)]
    finish(machine, tickets + late, 2, 1)
    assert machine.take() == ["1", "2"]


def test_in_a_window_finished_groups_overtake_running_ones():
    machine = admission(order="window", max_staleness=4)
    tickets = start_all(machine, version=0)
    finish(machine, tickets, 5)
    assert machine.take() is None
    finish(machine, tickets, 3)
    assert machine.take() == ["3", "5"]


def test_in_a_window_a_group_is_waited_for_at_its_last_chance():
    machine = admission(order="window")
    tickets = start_all(machine, version=0)
    assert places(tickets) == [0, 1, 2]
    finish(machine, tickets, 2, 1)
    assert machine.take() == ["1", "2"]  # row 0 may still be trained on in step 1
    tickets += start_all(machine, version=1)
    finish(machine, tickets, 3, 4)
    assert machine.take() is None  # but not in step 2
    finish(machine, tickets, 0)
    assert machine.take() == ["0", "3"]


def test_ready_takes_the_oldest_that_finished_and_gives_up_what_is_too_old():
    machine = admission(order="ready")
    tickets = start_all(machine, version=0)
    finish(machine, tickets, 3, 1)
    assert machine.give_up_too_old() == []
    assert machine.take() == ["1", "3"]
    assert machine.give_up_too_old() == []  # rows 0 and 2 may still be trained on in step 1
    tickets += start_all(machine, version=1)
    finish(machine, tickets, 4, 2, 5)
    assert machine.take() == ["2", "4"]
    assert machine.give_up_too_old() == [(tickets[0], None)]
    assert machine.take() is None
    tickets += start_all(machine, version=2)
    finish(machine, tickets, 6)
    assert machine.take() == ["5", "6"]


def test_ready_does_not_train_on_what_is_too_old_before_it_is_given_up():
    machine = admission(order="ready", max_staleness=2)
    tickets = start_all(machine, version=0)
    finish(machine, tickets, 4, 5)
    assert machine.take() == ["4", "5"]
    tickets += start_all(machine, version=1)
    finish(machine, tickets, 6, 7)
    assert machine.take() == ["6", "7"]
    finish(machine, tickets, 3, 2, 1, 0)  # all at their last chance, of which one step takes two
    assert machine.take() == ["0", "1"]
    assert machine.take() is None
    assert machine.give_up_too_old() == [(tickets[3], "3"), (tickets[2], "2")]
    assert machine.unconsumed() == (8, [])


def test_what_an_episode_returns_after_it_was_given_up_does_not_count():
    machine = admission(order="ready", max_staleness=0)
    (ticket, other) = start_all(machine, version=0)
    assert machine.lose(ticket)
    assert not machine.lose(ticket)
    assert not machine.accept(ticket, "late")
    finish(machine, [other], 1)
    assert not machine.accept(other, "again")
    assert machine.take() is None
    assert machine.unconsumed() == (2, [1])


def test_a_continued_run_first_repeats_the_rows_that_were_not_consumed():
    start = Cursor(version=5, next_row=14, pending=(11, 13))
    machine = admission(max_staleness=0, start=start)
    assert machine.unconsumed() == (14, [11, 13])
    tickets = start_all(machine, version=5)
    assert tickets == [Ticket(place=11, version=5), Ticket(place=13, version=5)]
    finish(machine, tickets, 11, 13)
    assert machine.take() == ["11", "13"]
    assert places(start_all(machine, version=6)) == [14, 15]


def test_a_rank_keeps_its_rows_when_the_run_is_continued():
    start = Cursor(version=5, next_row=14, pending=(7, 9, 11, 12))
    ranks = [admission(rank=rank, world_size=2, start=start) for rank in range(2)]
    assert [places(start_all(rank, version=5)) for rank in ranks] == [
        [12, 14, 16, 18],
        [7, 9, 11, 15],
    ]


def test_ranks_own_alternate_rows():
    ranks = [admission(rank=rank, world_size=2, max_staleness=0) for rank in range(2)]
    assert [places(start_all(rank, version=0)) for rank in ranks] == [[0, 2], [1, 3]]


def test_the_cursor_of_two_ranks_lists_what_the_slower_one_has_not_started():
    # Rank 0 has used 0, 2, 4; rank 1 only 1, and 3 is running.
    assert merge_cursors(2, [(6, []), (5, [3])]) == Cursor(version=2, next_row=6, pending=(3, 5))


def test_what_is_waited_for_is_said_in_words():
    machine = admission(batch=6)
    finish(machine, start_all(machine, version=0), 1, 0)
    assert machine.waiting_for() == (
        "step 0 needs 6 groups; finished: 2, running: 10 "
        "(the oldest are the rows at places [2, 3, 4, 5, 6, 7, 8, 9])"
    )


BOOKS: dict[str, st.SearchStrategy] = {
    "setting": settings_of(st.sampled_from(ORDERS)),
    "kill_after": st.lists(st.integers(1, 100), max_size=2),
    "ranks_after": st.integers(1, 3),
}


def check_the_books(setting: Setting, kill_after: list[int], ranks_after: int) -> None:
    """Each row is trained on, lost or still to be used; `VirtualRun` checks the rest."""
    used, cursor = play(setting, kill_after, ranks_after=ranks_after)
    places = [use.place for use in used]
    assert len(places) == len(set(places)), "a row was used twice"
    assert not set(places) & set(cursor.pending), "a row would be used twice"
    assert set(places) | set(cursor.pending) == set(range(cursor.next_row)), "a row was skipped"


@settings(max_examples=500, deadline=None)
@given(**BOOKS)
def test_the_books_balance_after_every_event_whatever_happens_when(
    setting: Setting, kill_after: list[int], ranks_after: int
):
    check_the_books(setting, kill_after, ranks_after)


@settings(deadline=None)
@given(setting=settings_of(st.just("fifo")), kill_after=st.lists(st.integers(1, 100), max_size=2))
def test_with_fifo_neither_timing_nor_kills_change_what_a_rank_trains_on(
    setting: Setting, kill_after: list[int]
):
    def is_lost(place: int) -> bool:
        return random.Random(place).random() < setting.lost_share

    used, _ = play(setting, kill_after, is_lost=is_lost)
    for rank in range(setting.ranks):
        usable = (place for place in count(rank, setting.ranks) if not is_lost(place))
        expected = list(islice(usable, setting.num_steps * setting.batch))
        trained = [use.place for use in used if use.is_trained and use.rank == rank]
        assert trained[: len(expected)] == expected


@settings(deadline=None)
@given(
    setting=settings_of(st.sampled_from(ORDERS)),
    version=st.integers(0, 100),
    num_rows=st.integers(0, 10_000),
)
def test_a_run_continued_at_a_version_decides_like_a_fresh_one_shifted_by_it(
    setting: Setting, version: int, num_rows: int
):
    start = Cursor(version=version, next_row=num_rows)
    fresh, continued = VirtualRun(setting), VirtualRun(setting, start)
    fresh.advance_to(setting.num_steps)
    continued.advance_to(version + setting.num_steps)
    assert continued.decisions == [
        (what, rank, *(Ticket(t.place + num_rows, t.version + version) for t in tickets))
        for what, rank, *tickets in fresh.decisions
    ]


@settings(deadline=None)
@given(setting=settings_of(st.sampled_from(ORDERS)))
def test_when_nothing_runs_any_more_as_many_may_start_as_in_a_fresh_run(setting: Setting):
    run = VirtualRun(setting)
    run.advance_to(setting.num_steps)
    run.end_all_episodes()
    capacity = len(start_all(setting.machine(Cursor(), max_running=10_000), version=0))
    for rank, ledger in enumerate(run.ledgers):
        in_use = len(ledger.done) + setting.batch * ledger.has_taken
        assert run.num_startable(rank) == min(setting.max_running, capacity - in_use)
