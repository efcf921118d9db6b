"""Every interleaving of a small run: no row used twice, none too old, never stuck, killed or not.

The search has no limit on rows, updates, losses and kills: it goes on until no new state turns up.
Two worlds are in the same state if they differ only in the numbers of rows and versions: then the
same can happen to both (tests/rollout/test_admission.py checks that numbers do not matter).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import pytest

from arealite.rollout.admission import Admission, Order, Ticket, merge_cursors
from arealite.types import Cursor

ORDERS: tuple[Order, ...] = ("fifo", "window", "ready")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """How large a run is."""

    order: Order
    batch: int = 2
    max_staleness: int = 1
    max_running: int = 3
    ranks: int = 1
    max_lost: int = 1  # rows of one rank that fail between two batches
    can_be_killed: bool = True

    def __str__(self) -> str:
        return (
            f"{self.order} batch={self.batch} staleness={self.max_staleness} "
            f"running={self.max_running} ranks={self.ranks} lost={self.max_lost}"
        ) + " killed" * self.can_be_killed

    def machine(self, start: Cursor, rank: int) -> Admission[Ticket]:
        return Admission[Ticket](
            batch=self.batch,
            max_staleness=self.max_staleness,
            max_running=self.max_running,
            start=start,
            order=self.order,
            rank=rank,
            world_size=self.ranks,
        )


class Ledger(NamedTuple):
    """What has become of the rows of one rank; those not mentioned are trained on or recorded."""

    next_place: int
    pending: tuple[int, ...] = ()  # to be repeated after a kill
    running: tuple[Ticket, ...] = ()  # in the order of the line
    done: tuple[Ticket, ...] = ()
    lost: tuple[int, ...] = ()  # not recorded yet: the trainer does it when it takes a batch
    has_taken: bool = False  # the batch of the step in training

    def unused(self) -> list[int]:
        """Places below `next_place` that a run killed now has to repeat."""
        under_way = [ticket.place for ticket in (*self.running, *self.done)]
        return sorted([*self.pending, *under_way, *self.lost])


class World(NamedTuple):
    """Rollout threads and a trainer, between two events."""

    version: int  # of the weights
    ledgers: tuple[Ledger, ...]
    machines: tuple[Admission[Ticket], ...]

    def on_rank(self, rank: int, ledger: Ledger, machine: Admission[Ticket]) -> "World":
        """This world after an event on one rank."""
        ledgers, machines = list(self.ledgers), list(self.machines)
        ledgers[rank], machines[rank] = ledger, machine
        return World(self.version, tuple(ledgers), tuple(machines))


def begin(scope: Scope, start: Cursor) -> World:
    """A run that starts or continues at the cursor."""
    ranks = range(scope.ranks)
    ledgers = [
        Ledger(start.next_row + rank, tuple(p for p in start.pending if p % scope.ranks == rank))
        for rank in ranks
    ]
    machines = [scope.machine(start, rank) for rank in ranks]
    return World(start.version, tuple(ledgers), tuple(machines))


def state(world: World, scope: Scope) -> bytes:
    """The same for two worlds with the same future."""
    codes: list[int] = []
    for ledger in world.ledgers:
        codes += [len(ledger.running), len(ledger.done), len(ledger.pending), len(ledger.lost)]
        codes.append(ledger.has_taken)
        if scope.can_be_killed:  # rows that no rank has started are dealt anew
            codes.append(ledger.next_place // scope.ranks - least_started(world, scope))
        tickets = sorted((*ledger.running, *ledger.done))
        codes += [ticket in ledger.done for ticket in tickets]
        # What is too old stays it, however old it gets.
        codes += [min(world.version - t.version, scope.max_staleness + 1) for t in tickets]
    return bytes(codes)


def least_started(world: World, scope: Scope) -> int:
    """Rows that the rank which is behind has started."""
    return min(ledger.next_place // scope.ranks for ledger in world.ledgers)


def has_drifted(world: World, scope: Scope, rank: int) -> bool:
    """Whether this rank has used up a batch more than the other: there must be a limit to that."""
    used = [ledger.next_place // scope.ranks - len(ledger.unused()) for ledger in world.ledgers]
    return scope.can_be_killed and used[rank] - min(used) > scope.batch


def clone(machine: Admission[Ticket]) -> Admission[Ticket]:
    """A machine that goes its own way; many times faster than copy.deepcopy."""
    twin = Admission.__new__(Admission)
    for name, value in vars(machine).items():
        twin.__dict__[name] = value.copy() if isinstance(value, dict | list) else value
    return twin


def successors(world: World, scope: Scope) -> Iterator[tuple[str, World]]:
    """Whatever may happen next, checked as it happens."""
    for rank in range(scope.ranks):
        yield from started(world, scope, rank)
        yield from ended(world, scope, rank)
        yield from given_up(world, scope, rank)
        yield from taken(world, scope, rank)
    if all(ledger.has_taken for ledger in world.ledgers):
        ledgers = tuple(ledger._replace(has_taken=False) for ledger in world.ledgers)
        yield "push", World(world.version + 1, ledgers, world.machines)
    if scope.can_be_killed and not any(ledger.has_taken for ledger in world.ledgers):
        yield "kill", killed(world, scope)


def started(world: World, scope: Scope, rank: int) -> Iterator[tuple[str, World]]:
    ledger, machine = world.ledgers[rank], clone(world.machines[rank])
    ticket = machine.start(world.version)
    if ticket is None:
        return
    if ledger.pending:
        place, ledger = ledger.pending[0], ledger._replace(pending=ledger.pending[1:])
    else:
        place, ledger = (
            ledger.next_place,
            ledger._replace(next_place=ledger.next_place + scope.ranks),
        )
    assert ticket == Ticket(place, world.version), "the next row in order"
    assert len(ledger.running) < scope.max_running
    assert len(ledger.running) + len(ledger.done) < (scope.max_staleness + 1) * scope.batch
    yield "start", world.on_rank(rank, ledger._replace(running=(*ledger.running, ticket)), machine)


def ended(world: World, scope: Scope, rank: int) -> Iterator[tuple[str, World]]:
    ledger = world.ledgers[rank]
    can_fail = len(ledger.lost) < scope.max_lost and not has_drifted(world, scope, rank)
    for ticket in ledger.running:
        running = tuple(other for other in ledger.running if other is not ticket)
        machine = clone(world.machines[rank])
        assert machine.accept(ticket, ticket)
        done = ledger._replace(running=running, done=(*ledger.done, ticket))
        yield "finish", world.on_rank(rank, done, machine)
        if can_fail:
            machine = clone(world.machines[rank])
            assert machine.lose(ticket)
            lost = ledger._replace(running=running, lost=(*ledger.lost, ticket.place))
            yield "fail", world.on_rank(rank, lost, machine)


def given_up(world: World, scope: Scope, rank: int) -> Iterator[tuple[str, World]]:
    ledger, machine = world.ledgers[rank], clone(world.machines[rank])
    too_old = {
        ticket: None if ticket in ledger.running else ticket
        for ticket in (*ledger.running, *ledger.done)
        if next_step(world, rank) - ticket.version > scope.max_staleness
    }
    assert dict(machine.give_up_too_old()) == too_old
    if not too_old:
        return
    assert scope.order == "ready", "only ready drops anything"
    assert not any(machine.accept(ticket, ticket) or machine.lose(ticket) for ticket in too_old)
    ledger = ledger._replace(
        running=tuple(ticket for ticket in ledger.running if ticket not in too_old),
        done=tuple(ticket for ticket in ledger.done if ticket not in too_old),
        lost=(*ledger.lost, *(ticket.place for ticket in too_old)),
    )
    yield "give up", world.on_rank(rank, ledger, machine)


def taken(world: World, scope: Scope, rank: int) -> Iterator[tuple[str, World]]:
    ledger, machine = world.ledgers[rank], clone(world.machines[rank])
    if ledger.has_taken:
        return
    batch = machine.take()
    assert batch == next_batch(ledger, world.version, scope)
    if batch is None:
        return
    assert all(0 <= world.version - ticket.version <= scope.max_staleness for ticket in batch)
    done = tuple(ticket for ticket in ledger.done if ticket not in batch)
    yield "take", world.on_rank(rank, ledger._replace(done=done, lost=(), has_taken=True), machine)


def next_batch(ledger: Ledger, step: int, scope: Scope) -> list[Ticket] | None:
    """What the order's definition says, word by word."""
    line = sorted((*ledger.running, *ledger.done))
    if scope.order == "fifo":
        batch = [ticket for ticket in line[: scope.batch] if ticket in ledger.done]
    elif scope.order == "window":
        batch = sorted(ledger.done)[: scope.batch]
        others = [ticket for ticket in line if ticket not in batch]
        steps = [step + 1 + number // scope.batch for number in range(len(others))]
        if any(s - t.version > scope.max_staleness for s, t in zip(steps, others, strict=True)):
            return None
    else:
        usable = [t for t in ledger.done if step - t.version <= scope.max_staleness]
        batch = sorted(usable)[: scope.batch]
    return batch if len(batch) == scope.batch else None


def next_step(world: World, rank: int) -> int:
    """The step that takes this rank's next batch."""
    return world.version + world.ledgers[rank].has_taken


def killed(world: World, scope: Scope) -> World:
    """The run that continues from a checkpoint of this moment.

    A kill takes everything back to the latest checkpoint. So killing at each moment at which a
    checkpoint can be written shows all that can follow a kill at any later one.
    """
    cursor = merge_cursors(world.version, cursor_parts(world))
    horizon = max(ledger.next_place for ledger in world.ledgers) + scope.ranks
    assert set(cursor.pending) | set(range(cursor.next_row, horizon)) == {
        place
        for rank, ledger in enumerate(world.ledgers)
        for place in (*ledger.unused(), *range(ledger.next_place, horizon, scope.ranks))
    }, "a row would be lost or used twice"
    return begin(scope, cursor)


def cursor_parts(world: World) -> list[tuple[int, list[int]]]:
    """As `RolloutExecutor.cursor` collects them."""
    parts = []
    for ledger, machine in zip(world.ledgers, world.machines, strict=True):
        next_place, places = machine.unconsumed()
        assert (next_place, sorted([*places, *ledger.lost])) == (ledger.next_place, ledger.unused())
        parts.append((next_place, [*places, *ledger.lost]))
    return parts


def explore(scope: Scope) -> int:
    """The number of states. Each keeps the invariants, and leads to another training step."""
    first = begin(scope, Cursor())
    frontier, numbers = [first], {state(first, scope): 0}
    origins: list[list[int]] = [[]]  # of each state, those from which it comes without a fault
    trained: list[int] = []  # states from which the next weights can be pushed
    while frontier:
        world = frontier.pop()
        cursor_parts(world)
        number = numbers[state(world, scope)]
        for event, successor in successors(world, scope):
            key = state(successor, scope)
            if key not in numbers:
                numbers[key] = len(numbers)
                origins.append([])
                frontier.append(successor)
            if event == "push":
                trained.append(number)
            elif event not in ("fail", "kill"):
                origins[numbers[key]].append(number)
    assert num_ancestors(trained, origins) == len(numbers), "a run can get stuck"
    return len(numbers)


def num_ancestors(targets: list[int], origins: list[list[int]]) -> int:
    """How many states lead to one of these, themselves included."""
    found, frontier = set(targets), list(targets)
    while frontier:
        for origin in origins[frontier.pop()]:
            if origin not in found:
                found.add(origin)
                frontier.append(origin)
    return len(found)


SMALL_SCOPES = [
    *(
        Scope(order=order, batch=batch, max_staleness=max_staleness)
        for order, batch, max_staleness in product(ORDERS, (1, 2), (0, 1, 2))
    ),
    Scope(order="fifo", max_staleness=2, max_running=6, max_lost=2),
    Scope(order="window", max_staleness=2, max_running=6, max_lost=2),
    Scope(order="fifo", batch=1, max_running=2, ranks=2),
    Scope(order="window", batch=1, max_running=2, ranks=2),
    Scope(order="ready", batch=1, max_running=2, ranks=2, can_be_killed=False),
]


@pytest.mark.parametrize("scope", SMALL_SCOPES, ids=str)
def test_every_interleaving_keeps_the_invariants(scope: Scope):
    assert explore(scope) > 5
