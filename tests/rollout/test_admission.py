"""The state machine of admission, by hand and against its invariants."""

import random

from hypothesis import given
from hypothesis import strategies as st

from arealite.rollout.admission import Admission, Ticket, merge_cursors
from arealite.types import Cursor


def admission(**overrides: object) -> Admission[int]:
    settings: dict = {"batch": 2, "max_staleness": 1, "max_running": 100, "start": Cursor()}
    return Admission[int](**(settings | overrides))


def start_all(machine: Admission[int], version: int) -> list[Ticket]:
    tickets = []
    while ticket := machine.start(version):
        tickets.append(ticket)
    return tickets


def test_synchronous_training_starts_one_batch_per_version():
    machine = admission(max_staleness=0)
    assert [t.slot for t in start_all(machine, version=0)] == [0, 1]
    assert start_all(machine, version=0) == []
    assert [t.slot for t in start_all(machine, version=1)] == [2, 3]


def test_staleness_of_one_starts_one_batch_ahead():
    assert len(start_all(admission(max_staleness=1), version=0)) == 4


def test_the_limit_of_running_episodes_holds():
    machine = admission(max_running=3)
    assert len(start_all(machine, version=0)) == 3
    machine.accept(0, 10)
    assert [t.slot for t in start_all(machine, version=0)] == [3]


def test_a_batch_is_given_in_the_order_of_its_slots_once_it_is_complete():
    machine = admission()
    start_all(machine, version=0)
    machine.accept(1, 11)
    assert machine.take() is None
    machine.accept(0, 10)
    assert machine.take() == [10, 11]


def test_a_lost_slot_takes_the_next_row():
    machine = admission(max_staleness=0)
    start_all(machine, version=0)
    machine.lose(0)
    assert start_all(machine, version=0) == [Ticket(slot=0, place=2)]


def test_a_resumed_run_first_repeats_the_rows_that_were_not_consumed():
    start = Cursor(version=5, next_row=14, pending=(11, 13))
    machine = admission(max_staleness=0, start=start)
    assert start_all(machine, version=5) == [Ticket(slot=10, place=11), Ticket(slot=11, place=13)]
    machine.accept(10, 0)
    machine.accept(11, 0)
    machine.take()
    assert [t.place for t in start_all(machine, version=6)] == [14, 15]


def test_ranks_own_alternate_rows():
    ranks = [admission(rank=rank, world_size=2, max_staleness=0) for rank in range(2)]
    assert [[t.place for t in start_all(rank, version=0)] for rank in ranks] == [[0, 2], [1, 3]]


def test_the_cursor_of_two_ranks_lists_what_the_slower_one_has_not_started():
    # Rank 0 has used 0, 2, 4; rank 1 only 1, and 3 is running.
    assert merge_cursors(2, [(6, []), (5, [3])]) == Cursor(version=2, next_row=6, pending=(3, 5))


@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    max_staleness=st.integers(0, 3),
    max_running=st.integers(1, 9),
    ranks=st.integers(1, 3),
    steps=st.integers(1, 6),
)
def test_whatever_finishes_when_each_row_is_consumed_once_and_none_is_too_old(
    seed: int, batch: int, max_staleness: int, max_running: int, ranks: int, steps: int
):
    dice = random.Random(seed)
    start, consumed, lost = Cursor(), [], []
    for _ in range(2):  # the second half continues from the cursor of the first
        machines = [
            Admission[tuple[int, int]](
                batch=batch,
                max_staleness=max_staleness,
                max_running=max_running,
                start=start,
                rank=rank,
                world_size=ranks,
            )
            for rank in range(ranks)
        ]
        for version in range(start.version, start.version + steps):
            for machine in machines:
                running: list[tuple[Ticket, int]] = getattr(machine, "running", [])
                while (groups := machine.take()) is None:
                    running += [(ticket, version) for ticket in start_all(machine, version)]
                    assert len(running) <= max_running
                    ticket, started = running.pop(dice.randrange(len(running)))
                    if dice.random() < 0.2:
                        machine.lose(ticket.slot)
                        lost.append(ticket.place)
                    else:
                        machine.accept(ticket.slot, (ticket.place, started))
                machine.running = running  # type: ignore[attr-defined]
                assert all(version - started <= max_staleness for _, started in groups)
                consumed += [place for place, _ in groups]
        start = merge_cursors(start.version + steps, [m.unconsumed() for m in machines])
    used = consumed + lost
    assert len(used) == len(set(used)), "a row was used twice"
    assert set(used) | set(start.pending) == set(range(start.next_row)), "a row was skipped"
    assert len(consumed) == 2 * steps * batch * ranks
