"""Who serves, after whatever sequence of deaths, updates and late answers."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from arealite.errors import ServerError
from arealite.inference.fleet import Fleet


def fleet_of(count: int, *, version: int = 3) -> Fleet:
    fleet = Fleet([f"http://s{index}" for index in range(count)], is_pusher=True)
    fleet.version = version
    for server in fleet.servers:
        fleet.heard(server, version)
    return fleet


def test_the_least_loaded_server_is_chosen():
    fleet = fleet_of(3)
    for server, running in zip(fleet.servers, (4, 1, 2), strict=True):
        server.running = running
    assert fleet.choose() is fleet.servers[1]


def test_a_conversation_stays_with_its_server_while_that_one_serves():
    fleet = fleet_of(2)
    first = fleet.choose(conversation=7)
    assert first is not None
    first.running = 100
    assert fleet.choose(conversation=7) is first
    fleet.lost(first, "killed")
    other = fleet.choose(conversation=7)
    assert other is not None
    assert other is not first
    fleet.heard(first, 3)
    assert fleet.choose(conversation=7) is other, "its beginning is in the other's cache now"


def test_a_server_that_just_failed_a_request_is_avoided_if_there_is_another():
    fleet = fleet_of(2)
    assert fleet.choose(avoid=fleet.servers[0]) is fleet.servers[1]
    fleet.lost(fleet.servers[1], "killed")
    assert fleet.choose(avoid=fleet.servers[0]) is fleet.servers[0]


@pytest.mark.parametrize("version", [None, 2, 4])
def test_a_server_with_other_weights_does_not_serve(version: int | None):
    fleet = fleet_of(1)
    fleet.heard(fleet.servers[0], version)
    assert fleet.choose() is None
    fleet.synced(fleet.servers[0], 3)
    assert fleet.choose() is fleet.servers[0]


def test_before_the_first_push_any_weights_serve():
    fleet = Fleet(["http://a"], is_pusher=True)
    assert fleet.choose() is None
    fleet.heard(fleet.servers[0], None)
    assert fleet.choose() is fleet.servers[0]


def test_who_does_not_push_takes_a_server_that_is_one_version_ahead_for_current():
    fleet = fleet_of(1)
    fleet.is_pusher = False
    fleet.heard(fleet.servers[0], 4)
    assert fleet.choose() is fleet.servers[0]
    fleet.version = 4
    fleet.heard(fleet.servers[0], 3, asked_at=3)
    assert fleet.choose() is fleet.servers[0], "the answer was right when it was asked for"
    fleet.heard(fleet.servers[0], 3, asked_at=4)
    assert fleet.choose() is None


def test_who_does_not_push_takes_the_servers_word_for_an_update_that_it_had_missed():
    fleet = fleet_of(1)
    fleet.is_pusher = False
    fleet.missed_update(fleet.servers[0], "its reply named other weights")
    fleet.heard(fleet.servers[0], None)
    assert fleet.choose() is None
    fleet.heard(fleet.servers[0], 3)
    assert fleet.choose() is fleet.servers[0]


def test_an_update_commits_without_the_server_that_missed_it():
    fleet = fleet_of(2)
    slow, fast = fleet.begin_update()
    fleet.missed_update(slow, "500")
    assert fleet.in_update() == [fast]
    fleet.commit(4)
    fleet.end_update()
    fleet.heard(slow, 4)
    assert fleet.serving() == [fast], "half of the update may have arrived, whatever it says"
    fleet.synced(slow, 4)
    assert fleet.serving() == [slow, fast]


def test_no_request_starts_while_running_ones_are_drained():
    fleet = fleet_of(1)
    fleet.begin_update(is_drained=True)
    assert fleet.choose() is None
    fleet.end_update()
    assert fleet.choose() is fleet.servers[0]


def test_two_servers_at_one_address_are_refused():
    with pytest.raises(ServerError, match="an address of its own"):
        Fleet(["http://a", "http://a"])


# --- Every interleaving of a small run ------------------------------------------------------------


@dataclass
class Real:
    """A server as it is, whatever the fleet believes."""

    is_alive: bool = True
    version: int | None = 0
    is_paused: bool = False
    is_mixed: bool = False  # an update has begun and not come to its end


@dataclass
class World:
    """Two servers, one trainer that pushes, and probes that may be late."""

    fleet: Fleet
    real: list[Real]
    probes: dict[int, tuple[int, int | None]] = field(default_factory=dict)
    phase: str = "idle"  # or pausing, sending, resuming
    done: frozenset[int] = frozenset()  # servers that went through the present phase
    faults_left: int = 2
    updates_left: int = 2

    def state(self) -> tuple[object, ...]:
        """Worlds with the same state have the same future."""
        servers = self.fleet.servers
        return (
            tuple((s.state, s.version, s.has_missed_update) for s in servers),
            tuple(servers.index(s) for s in self.fleet.in_update()),
            self.fleet.version,
            tuple((r.is_alive, r.version, r.is_paused, r.is_mixed) for r in self.real),
            tuple(sorted((i, n == self.fleet.num_updates, v) for i, (n, v) in self.probes.items())),
            (self.phase, self.done, self.faults_left, self.updates_left),
        )

    def moves(self) -> Iterator[Callable[["World"], None]]:
        for index, real in enumerate(self.real):
            if self.faults_left and real.is_alive:
                yield lambda world, i=index: world.crash(i)
                if self.phase in ("pausing", "sending") and self.takes_part(index):
                    yield lambda world, i=index: world.refuse(i)
            if not real.is_alive:
                yield lambda world, i=index: world.boot(i)
                yield lambda world, i=index: world.notice(i)
            elif index not in self.probes:
                yield lambda world, i=index: world.ask(i)
            if index in self.probes:
                yield lambda world, i=index: world.answer(i)
            if self.phase == "idle" and self.fleet.servers[index].state == "stale":
                yield lambda world, i=index: world.sync(i)
            if self.phase != "idle" and self.takes_part(index) and index not in self.done:
                yield lambda world, i=index: world.go_through_phase(i)
        if self.phase != "idle" or self.updates_left:
            yield World.next_phase

    def takes_part(self, index: int) -> bool:
        return self.fleet.servers[index] in self.fleet.in_update()

    def crash(self, index: int) -> None:
        self.real[index] = Real(is_alive=False, version=None)
        self.faults_left -= 1

    def boot(self, index: int) -> None:
        self.real[index] = Real(version=None)

    def notice(self, index: int) -> None:
        self.fleet.lost(self.fleet.servers[index], "dead")

    def refuse(self, index: int) -> None:
        self.fleet.missed_update(self.fleet.servers[index], "500")
        self.faults_left -= 1

    def ask(self, index: int) -> None:
        self.probes[index] = (self.fleet.num_updates, self.real[index].version)

    def answer(self, index: int) -> None:
        num_updates, version = self.probes.pop(index)
        if num_updates == self.fleet.num_updates and not self.fleet.is_updating:
            self.fleet.heard(self.fleet.servers[index], version)

    def sync(self, index: int) -> None:
        real, server = self.real[index], self.fleet.servers[index]
        if real.is_alive:
            self.real[index] = Real(version=self.fleet.version)
            self.fleet.synced(server, self.fleet.version)
        else:
            self.fleet.lost(server, "dead")

    def go_through_phase(self, index: int) -> None:
        """The request of this phase to one server: it may find that the server was replaced."""
        real, server = self.real[index], self.fleet.servers[index]
        was_replaced = self.phase != "pausing" and not real.is_paused
        if not real.is_alive:
            self.fleet.lost(server, "dead")
        elif was_replaced:
            self.fleet.missed_update(server, "no update is active")
        elif self.phase == "pausing":
            real.is_paused = True
        elif self.phase == "sending":
            real.version, real.is_mixed = self.fleet.version + 1, False
        else:
            real.is_paused = False
        self.done |= {index}

    def next_phase(self) -> None:
        if self.phase == "idle":
            self.fleet.begin_update()
            self.updates_left -= 1
            self.phase = "pausing"
        elif any(self.takes_part(i) and i not in self.done for i in range(len(self.real))):
            return  # somebody has not gone through it yet
        elif self.phase == "pausing":
            self.phase = "sending"
        elif self.phase == "sending":
            self.fleet.commit(self.fleet.version + 1)
            self.phase = "resuming"
        else:
            self.fleet.end_update()
            self.phase = "idle"
        self.done = frozenset()

    def check(self) -> None:
        for real, server in zip(self.real, self.fleet.servers, strict=True):
            if server.state != "serving" or not real.is_alive or real.version is None:
                continue  # asked, it fails, or says by its reply that its weights are not ours
            if self.fleet.is_updating and server in self.fleet.in_update():
                assert real.version in (self.fleet.version, self.fleet.version + 1)
            else:
                assert real.version == self.fleet.version, "it serves weights that it should not"
                assert not real.is_paused, "it is paused, and nobody will resume it"

    def settle(self) -> None:
        """What happens if there are no more faults: everybody serves in the end."""
        while self.phase != "idle":
            for index in range(len(self.real)):
                if self.takes_part(index) and index not in self.done:
                    self.go_through_phase(index)
            self.next_phase()
        for _ in range(2):
            for index, real in enumerate(self.real):
                if not real.is_alive:
                    self.notice(index)
                    self.boot(index)
                self.probes.pop(index, None)
                self.ask(index)
                self.answer(index)
                if self.fleet.servers[index].state == "stale":
                    self.sync(index)
        assert len(self.fleet.serving()) == len(self.real), self.fleet.describe()
        self.check()


def explore(world: World) -> int:
    """Number of different states that the world can get into; all of them are checked."""
    frontier, seen = [world], {world.state()}
    while frontier:
        world = frontier.pop()
        world.check()
        copy.deepcopy(world).settle()
        for move in world.moves():
            successor = copy.deepcopy(world)
            move(successor)
            if successor.state() not in seen:
                seen.add(successor.state())
                frontier.append(successor)
    return len(seen)


@pytest.mark.parametrize(
    ("servers", "faults", "updates"),
    [
        (1, 2, 2),
        (2, 1, 1),
        pytest.param(2, 2, 1, marks=pytest.mark.soak),
        pytest.param(2, 1, 2, marks=pytest.mark.soak),
    ],
)
def test_no_server_serves_other_weights_or_stays_paused(servers: int, faults: int, updates: int):
    fleet = fleet_of(servers, version=0)
    world = World(fleet, [Real() for _ in range(servers)])
    world.faults_left, world.updates_left = faults, updates
    states = explore(world)
    print(f"{servers} servers, {faults} faults, {updates} updates: {states} states")
    assert states > 50
