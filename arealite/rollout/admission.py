"""Which row starts when, and which groups make up a training batch: one pure state machine.

A run is an endless line of slots; training step v consumes slots [v * batch, (v + 1) * batch).
A slot may start once `slot < (version + max_staleness + 1) * batch`: whatever the timing, its
group is then at most `max_staleness` versions old when it is trained on. A slot that loses its
group takes the next row. No threads, no clock, no network here.
"""

import heapq
from dataclasses import dataclass
from typing import Generic, TypeVar

from arealite.types import Cursor

Group = TypeVar("Group")


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to start one episode."""

    slot: int  # its place in training
    place: int  # its row's place in the run's order


class Admission(Generic[Group]):
    """First in, first out, for one rank out of `world_size`.

    Args:
        batch: groups that this rank contributes to a training step.
        max_running: episodes at the same time.
        start: where the run stands; its places belong to all ranks together.
    """

    def __init__(
        self,
        *,
        batch: int,
        max_staleness: int,
        max_running: int,
        start: Cursor,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._batch = batch
        self._max_staleness = max_staleness
        self._max_running = max_running
        self._step = start.version
        self._next_slot = start.version * batch
        self._lost_slots: list[int] = []
        self._pending = list(start.pending[rank::world_size])
        self._next_place = start.next_row + rank
        self._stride = world_size
        self._running: dict[int, int] = {}  # slot -> place
        self._done: dict[int, tuple[int, Group]] = {}  # slot -> place and group

    def start(self, version: int) -> Ticket | None:
        """The next episode that may start under weights `version`, if any may."""
        if len(self._running) >= self._max_running:
            return None
        if self._lost_slots:
            slot = heapq.heappop(self._lost_slots)
        elif self._next_slot < (version + self._max_staleness + 1) * self._batch:
            slot, self._next_slot = self._next_slot, self._next_slot + 1
        else:
            return None
        self._running[slot] = self._take_place()
        return Ticket(slot=slot, place=self._running[slot])

    def accept(self, slot: int, group: Group) -> None:
        """The episode of this slot has given its group."""
        self._done[slot] = (self._running.pop(slot), group)

    def lose(self, slot: int) -> None:
        """The episode was rejected or failed: the slot waits for the next row."""
        del self._running[slot]
        heapq.heappush(self._lost_slots, slot)

    def take(self) -> list[Group] | None:
        """The groups of the next training step, in slot order; None until all are there."""
        slots = range(self._step * self._batch, (self._step + 1) * self._batch)
        if not all(slot in self._done for slot in slots):
            return None
        self._step += 1
        return [self._done.pop(slot)[1] for slot in slots]

    def unconsumed(self) -> tuple[int, list[int]]:
        """The first place never started, and the earlier ones not yet trained on."""
        places = [place for place, _ in self._done.values()]
        return self._next_place, sorted([*places, *self._running.values(), *self._pending])

    def waiting_for(self) -> str:
        """In words, what the next batch lacks."""
        slots = range(self._step * self._batch, (self._step + 1) * self._batch)
        missing = [slot for slot in slots if slot not in self._done]
        running = [self._running[slot] for slot in missing if slot in self._running]
        return (
            f"step {self._step} has {self._batch - len(missing)} of {self._batch} groups; "
            f"{len(running)} of the others are running (rows at places {running[:8]}), "
            f"{len(missing) - len(running)} have not started"
        )

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
