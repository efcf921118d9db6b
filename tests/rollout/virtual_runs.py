"""Whole runs on a virtual clock: episodes, training and looks at the engine take drawn times.

After every event the books must balance. Nothing here is asynchronous: the events are those that
the rollout threads and the trainers of all ranks cause, in the order of their drawn times.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

from hypothesis import strategies as st

from arealite.rollout.admission import Admission, Order, Ticket, merge_cursors
from arealite.types import Cursor

MOST_EVENTS = 20_000
"""Far more than any of these runs needs: beyond it, the run is stuck."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run as its user chooses it, and how its world behaves."""

    order: Order = "fifo"
    batch: int = 2
    max_staleness: int = 1
    max_running: int = 4
    ranks: int = 1
    num_steps: int = 6
    lost_share: float = 0.2  # of the episodes that are rejected or fail
    seed: int = 0  # of all that is drawn

    def machine(self, start: Cursor, rank: int = 0, **changed: int) -> Admission[Ticket]:
        """The admission of one rank."""
        limits = {
            "batch": self.batch,
            "max_staleness": self.max_staleness,
            "max_running": self.max_running,
        }
        return Admission[Ticket](
            **(limits | changed),
            start=start,
            order=self.order,
            rank=rank,
            world_size=self.ranks,
        )


def settings_of(orders: st.SearchStrategy[Order]) -> st.SearchStrategy[Setting]:
    """Settings with one of these orders."""
    return st.builds(
        Setting,
        order=orders,
        batch=st.integers(1, 5),
        max_staleness=st.integers(0, 4),
        max_running=st.integers(1, 20),
        ranks=st.integers(1, 3),
        num_steps=st.integers(1, 6),
        lost_share=st.sampled_from([0.0, 0.1, 0.5]),
        seed=st.integers(0, 2**32),
    )


@dataclass
class Ledger:
    """What has become of the rows of one rank."""

    pending: list[int]  # to be repeated
    next_place: int
    running: list[Ticket] = field(default_factory=list)
    done: list[Ticket] = field(default_factory=list)
    given_up: list[Ticket] = field(default_factory=list)  # whose episodes still run
    lost: list[int] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)
    has_taken: bool = False  # the batch of the step in training


class Use(NamedTuple):
    """A row that is done with."""

    rank: int
    place: int
    is_trained: bool  # or lost


class VirtualRun:
    """A run from a cursor on.

    Args:
        is_lost: of a place; by default the dice decide.
    """

    def __init__(
        self,
        setting: Setting,
        start: Cursor | None = None,
        *,
        is_lost: Callable[[int], bool] | None = None,
    ) -> None:
        start = start or Cursor()
        self.version = start.version
        self.decisions: list[tuple[object, ...]] = []  # of the machines, in order
        self._setting = setting
        self._dice = random.Random(setting.seed)
        self._is_lost = is_lost or (lambda place: self._dice.random() < setting.lost_share)
        self._machines = [setting.machine(start, rank) for rank in range(setting.ranks)]
        shares: list[list[int]] = [[] for _ in self._machines]
        for place in start.pending:
            shares[(place - start.next_row) % setting.ranks].append(place)
        self.ledgers = [Ledger(share, start.next_row + rank) for rank, share in enumerate(shares)]
        self._now = 0.0
        self._numbers = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        for rank in range(setting.ranks):
            self._at(0.0, lambda rank=rank: self._look(rank))

    def advance(self) -> None:
        """Let the next event happen, and whatever the trainers do about it."""
        self._now, _, event = heapq.heappop(self._events)
        event()
        for rank, ledger in enumerate(self.ledgers):
            if not ledger.has_taken:
                self._take(rank)
        for rank in range(self._setting.ranks):
            self._check(rank)

    def advance_to(self, version: int) -> None:
        """Let steps be trained until it is this one's turn; fails if they are not."""
        num_events = 0
        while self.version < version:
            self.advance()
            num_events += 1
            assert num_events < MOST_EVENTS, f"stuck: {[m.waiting_for() for m in self._machines]}"

    def cursor(self) -> Cursor:
        """As a checkpoint of this moment has it, with all losses recorded."""
        return merge_cursors(self.version, [machine.unconsumed() for machine in self._machines])

    def is_between_steps(self) -> bool:
        """Whether a checkpoint can be written."""
        return not any(ledger.has_taken for ledger in self.ledgers)

    def used(self) -> list[Use]:
        """The rows that are done with, those of each rank in the order in which they were."""
        return [
            Use(rank, place, is_trained)
            for rank, ledger in enumerate(self.ledgers)
            for is_trained, places in ((True, ledger.consumed), (False, ledger.lost))
            for place in places
        ]

    def end_all_episodes(self) -> None:
        """Lose whatever runs."""
        for machine, ledger in zip(self._machines, self.ledgers, strict=True):
            for ticket in ledger.running:
                assert machine.lose(ticket)
                ledger.lost.append(ticket.place)
            ledger.running.clear()

    def num_startable(self, rank: int) -> int:
        """Episodes that may start now, which thereby start."""
        before = len(self.ledgers[rank].running)
        self._start_all(rank)
        return len(self.ledgers[rank].running) - before

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._numbers), event))

    def _look(self, rank: int) -> None:
        """What the rollout thread does every now and then."""
        self._give_up(rank)
        self._start_all(rank)
        self._at(self._dice.uniform(0.1, 1.0), lambda: self._look(rank))

    def _give_up(self, rank: int) -> None:
        ledger = self.ledgers[rank]
        for ticket, group in self._machines[rank].give_up_too_old():
            self._decide("give up", rank, ticket)
            assert self._setting.order == "ready", "only ready drops anything"
            if group is None:
                ledger.running.remove(ticket)
                ledger.given_up.append(ticket)
            else:
                assert group is ticket
                ledger.done.remove(ticket)
            ledger.lost.append(ticket.place)

    def _start_all(self, rank: int) -> None:
        ledger = self.ledgers[rank]
        while ticket := self._machines[rank].start(self.version):
            self._decide("start", rank, ticket)
            if ledger.pending:
                expected = ledger.pending.pop(0)
            else:
                expected = ledger.next_place
                ledger.next_place += self._setting.ranks
            assert ticket == Ticket(expected, self.version), "the next row in order"
            ledger.running.append(ticket)
            is_slow = self._dice.random() < 0.1
            duration = self._dice.uniform(5, 30) if is_slow else self._dice.uniform(0, 3)
            self._at(duration, lambda ticket=ticket: self._end(rank, ticket))

    def _end(self, rank: int, ticket: Ticket) -> None:
        """The episode returns, or raises."""
        machine, ledger = self._machines[rank], self.ledgers[rank]
        is_lost = self._is_lost(ticket.place)
        is_news = machine.lose(ticket) if is_lost else machine.accept(ticket, ticket)
        assert is_news == (ticket not in ledger.given_up), "a late answer must not count"
        if not is_news:
            return
        ledger.running.remove(ticket)
        if is_lost:
            ledger.lost.append(ticket.place)
        else:
            ledger.done.append(ticket)

    def _take(self, rank: int) -> None:
        ledger = self.ledgers[rank]
        batch = self._machines[rank].take()
        if batch is None:
            return
        self._decide("take", rank, *batch)
        assert len(batch) == self._setting.batch
        for ticket in batch:
            assert 0 <= self.version - ticket.version <= self._setting.max_staleness
            ledger.done.remove(ticket)
            ledger.consumed.append(ticket.place)
        ledger.has_taken = True
        if all(ledger.has_taken for ledger in self.ledgers):
            self._at(self._dice.uniform(0, 5), self._push)

    def _push(self) -> None:
        self.version += 1
        for ledger in self.ledgers:
            ledger.has_taken = False

    def _check(self, rank: int) -> None:
        ledger = self.ledgers[rank]
        under_way = [ticket.place for ticket in (*ledger.running, *ledger.done)]
        assert len(ledger.running) <= self._setting.max_running
        assert len(under_way) <= (self._setting.max_staleness + 1) * self._setting.batch
        unconsumed = sorted([*ledger.pending, *under_way])
        assert self._machines[rank].unconsumed() == (ledger.next_place, unconsumed)

    def _decide(self, what: str, rank: int, *tickets: Ticket) -> None:
        self.decisions.append((what, rank, *tickets))


def play(
    setting: Setting,
    kill_after: Sequence[int] = (),
    *,
    ranks_after: int | None = None,
    is_lost: Callable[[int], bool] | None = None,
) -> tuple[list[Use], Cursor]:
    """What a run used up, and where it stands at its end, which it reaches through kills.

    Checkpoints are written at random; what happened after the latest one is forgotten.

    Args:
        kill_after: numbers of events from the start, or from where it continued, to a kill.
        ranks_after: number of ranks after each kill, if it changes.
        is_lost: of a place; by default the dice decide.
    """
    dice = random.Random(setting.seed)
    start, used = Cursor(), list[Use]()
    for num_events in kill_after:
        run, before = VirtualRun(setting, start, is_lost=is_lost), used
        for _ in range(num_events):
            if run.version == setting.num_steps:
                break
            run.advance()
            if run.is_between_steps() and dice.random() < 0.1:
                start, used = run.cursor(), before + run.used()
        seed = dice.randrange(2**32)
        setting = replace(setting, seed=seed, ranks=ranks_after or setting.ranks)
    run = VirtualRun(setting, start, is_lost=is_lost)
    run.advance_to(setting.num_steps)
    return used + run.used(), run.cursor()
