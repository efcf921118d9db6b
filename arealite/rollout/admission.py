"""Which row starts when, and which groups make up a training batch: one pure state machine.

The rows of a run form a line. Training step v consumes B groups of it, B being the batch. A row
starts under the weights of some version u; the age of its group is v - u, and never more than
`max_staleness`, whatever the timing. What a batch is made of is a choice:

    fifo     the B groups at the front of the line, once they have finished: which rows a step
             trains on does not depend on timing; a slow group holds up its batch.
    window   the first B of the line that have finished, as soon as all others can still be
             trained on in time: a slow group is waited for only at its last chance. Half as many
             groups run ahead as in fifo, so the mean age is half of it.
    ready    the first B of the line that have finished: nothing waits for a slow group; what got
             too old is given up, and that is what takes long to generate.

A row that is rejected, failed or given up leaves the line, and those behind it move up; the caller
records it. No threads, no clock, no network here.
"""

import heapq
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from arealite.types import Cursor

Group = TypeVar("Group")
Order = Literal["fifo", "window", "ready"]


@dataclass(frozen=True, order=True, slots=True)
class Ticket:
    """Leave to run one episode. Tickets of one rank sort in the order in which they started."""

    place: int  # of its row in the run's order; no two tickets of a run have the same
    version: int  # of the weights it starts under


class Admission(Generic[Group]):
    """The line of one rank out of `world_size`.

    Args:
        batch: groups that this rank contributes to a training step.
        max_staleness: the greatest age of a group when it is trained on, in versions.
        max_running: episodes at the same time.
        start: where the run stands; its places belong to all ranks together.
        order: what a batch is made of, see above.
    """

    def __init__(
        self,
        *,
        batch: int,
        max_staleness: int,
        max_running: int,
        start: Cursor,
        order: Order = "fifo",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._batch = batch
        self._max_staleness = max_staleness
        self._max_running = max_running
        self._order: Order = order
        # Groups can overtake each other only where fewer are under way than may be in time.
        most_ahead = max_staleness * batch
        self._num_ahead = (most_ahead + 1) // 2 if order == "window" else most_ahead
        self._step = start.version  # that takes the next batch
        # A rank keeps its rows when the run continues, so that its batches stay the same.
        self._pending = [p for p in start.pending if (p - start.next_row) % world_size == rank]
        self._next_place = start.next_row + rank
        self._stride = world_size
        self._running: dict[Ticket, None] = {}  # in the order of the line
        self._done: dict[Ticket, Group] = {}

    def start(self, version: int) -> Ticket | None:
        """The next episode that may start under weights `version`, if any may.

        At most so many are under way that the steps up to `version + max_staleness` take them all.
        """
        most_under_way = (version + 1 - self._step) * self._batch + self._num_ahead
        num_under_way = len(self._running) + len(self._done)
        if len(self._running) >= self._max_running or num_under_way >= most_under_way:
            return None
        ticket = Ticket(place=self._take_place(), version=version)
        self._running[ticket] = None
        return ticket

    def accept(self, ticket: Ticket, group: Group) -> bool:
        """Keep the group of an episode; False, and nothing else, if it was given up before."""
        is_kept = self.lose(ticket)
        if is_kept:
            self._done[ticket] = group
        return is_kept

    def lose(self, ticket: Ticket) -> bool:
        """Forget an episode without a group; False, and nothing else, if it was given up before."""
        if ticket not in self._running:
            return False
        del self._running[ticket]
        return True

    def give_up_too_old(self) -> list[tuple[Ticket, Group | None]]:
        """Forget what no step may train on any more; the group is None where it still runs.

        Only `order="ready"` has any. The caller ends the episodes; what they return is not kept.
        """
        running = [ticket for ticket in self._running if self._is_too_old(ticket)]
        done = [ticket for ticket in self._done if self._is_too_old(ticket)]
        for ticket in running:
            del self._running[ticket]
        return [*((t, None) for t in running), *((t, self._done.pop(t)) for t in done)]

    def take(self) -> list[Group] | None:
        """The groups of the next training step; None until they are there."""
        tickets = self._next_batch()
        if tickets is None:
            return None
        self._step += 1
        return [self._done.pop(ticket) for ticket in tickets]

    def unconsumed(self) -> tuple[int, list[int]]:
        """The first place never started, and the earlier ones not yet trained on or lost."""
        under_way = [ticket.place for ticket in (*self._running, *self._done)]
        return self._next_place, sorted([*under_way, *self._pending])

    def waiting_for(self) -> str:
        """In words, what the next batch lacks."""
        places = [ticket.place for ticket in self._running]
        return (
            f"step {self._step} needs {self._batch} groups; finished: {len(self._done)}, "
            f"running: {len(places)} (the oldest are the rows at places {places[:8]})"
        )

    def _next_batch(self) -> list[Ticket] | None:
        """What the next training step consumes, if it may begin."""
        in_time = (ticket for ticket in self._done if not self._is_too_old(ticket))
        tickets = heapq.nsmallest(self._batch, in_time)
        if len(tickets) < self._batch:
            return None
        if self._order == "fifo" and any(running < tickets[-1] for running in self._running):
            return None
        if self._order == "window" and not self._can_wait(set(tickets)):
            return None
        return tickets

    def _can_wait(self, tickets: set[Ticket]) -> bool:
        """Whether all but these can be trained on in time if the next step consumes these."""
        under_way = (*self._running, *self._done)
        versions = sorted(ticket.version for ticket in under_way if ticket not in tickets)
        # The n-th oldest has at most n before it, and a batch for each step until it is too old.
        return all(
            n < (version + self._max_staleness - self._step) * self._batch
            for n, version in enumerate(versions)
        )

    def _is_too_old(self, ticket: Ticket) -> bool:
        return ticket.version + self._max_staleness < self._step

    def _take_place(self) -> int:
        if self._pending:
            return self._pending.pop(0)
        place, self._next_place = self._next_place, self._next_place + self._stride
        return place


def merge_cursors(version: int, parts: list[tuple[int, list[int]]]) -> Cursor:
    """The cursor of the whole run from what each rank has not consumed.

    Rank r owns places r, r + ranks, ...; a rank that is behind leaves gaps, which are pending.
    """
    ranks = len(parts)
    next_row = max(next_place - rank for rank, (next_place, _) in enumerate(parts))
    pending = {place for _, places in parts for place in places}
    for rank, (next_place, _) in enumerate(parts):
        pending |= set(range(next_place, next_row + rank, ranks))
    return Cursor(version=version, next_row=next_row, pending=tuple(sorted(pending)))
