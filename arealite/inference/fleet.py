"""Which server may take a request, and which have the weights: one pure state machine.

    down ──answers──> stale ──given the weights──> serving
      ^                 ^                            │ │
      │                 └── did not take an update ──┘ │
      └────────────── died, or hangs ──────────────────┘

A server serves only while its weights are known to be those of the committed version. An update
goes to all that serve when it begins; one that does not acknowledge it is stale from then on, and
only `synced` brings it back. No threads, no clock, no network here.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from arealite.errors import ServerError

MAX_CONVERSATIONS = 16_384
"""So many latest conversations keep their server."""

State = Literal["down", "stale", "serving"]


@dataclass(eq=False, slots=True)
class Server:
    """One server as this process sees it."""

    address: str
    state: State = "down"
    reason: str = "it has not answered yet"  # why it does not serve
    version: int | None = None  # of its weights; None: those of the model folder
    running: int = 0  # requests of this process
    capacity: int | None = None  # sequences that it samples at the same time; None: it does not say
    num_workers: int = 1  # processes that take weights; one per GPU
    has_missed_update: bool = False


class Fleet:
    """The servers of a run.

    Args:
        is_pusher: whether this process pushes weights; then it knows the exact version of each
            server, where others may learn of a new version only after a server has it.
    """

    def __init__(self, addresses: list[str], *, is_pusher: bool = False) -> None:
        if not addresses:
            raise ServerError("No address of a server was given. Start one with `arealite serve`.")
        if len(set(addresses)) < len(addresses):
            raise ServerError(f"Each server needs an address of its own, but got {addresses}.")
        self.servers = [Server(address) for address in addresses]
        self.version = -1
        self.is_pusher = is_pusher
        self.is_closed_to_new = False  # an update waits for running requests to end
        self.num_updates = 0  # begun or ended: what was heard across a change means nothing
        self._updating: list[Server] | None = None
        self._of_conversation = OrderedDict[int, Server]()

    @property
    def is_updating(self) -> bool:
        return self._updating is not None

    def serving(self) -> list[Server]:
        return [server for server in self.servers if server.state == "serving"]

    def choose(
        self,
        conversation: int | None = None,
        avoid: Server | None = None,
        resting: Collection[Server] = (),
    ) -> Server | None:
        """The server for a request: that of its conversation, else the least loaded one.

        Args:
            avoid: one that just failed this request; taken only if there is no other.
            resting: those that asked to be left alone; never taken.
        """
        if self.is_closed_to_new:
            return None
        serving = [server for server in self.serving() if server not in resting]
        candidates = [server for server in serving if server is not avoid] or serving
        if not candidates:
            return None
        known = None if conversation is None else self._of_conversation.get(conversation)
        chosen = known if known in candidates else min(candidates, key=lambda s: s.running)
        if conversation is not None:
            self._of_conversation[conversation] = chosen
            self._of_conversation.move_to_end(conversation)
            if len(self._of_conversation) > MAX_CONVERSATIONS:
                self._of_conversation.popitem(last=False)
        return chosen

    def heard(self, server: Server, version: int | None, *, asked_at: int | None = None) -> None:
        """The server's engine answered: it has weights of this version.

        Args:
            version: None for the weights of its model folder.
            asked_at: the committed version when it was asked.
        """
        server.version = version
        if not self.is_pusher:
            server.has_missed_update = False  # whoever pushes takes care of it
        if server.has_missed_update and server.state == "stale":
            return  # with the reason it has
        if server.has_missed_update or not self._is_current(version, asked_at):
            server.state = "stale"
            server.reason = f"it has weights of version {version}, not {self.version}"
        else:
            server.state, server.reason = "serving", ""

    def lost(self, server: Server, reason: str) -> None:
        """The server died, or does not answer any more."""
        self._leave_update(server)
        server.state, server.reason, server.version = "down", reason, None

    def missed_update(self, server: Server, reason: str) -> None:
        """The server answers, but did not acknowledge an update, or has unknown weights."""
        self._leave_update(server)
        server.has_missed_update = True
        if server.state != "down":
            server.state, server.reason = "stale", reason

    def begin_update(self, *, is_drained: bool = False) -> list[Server]:
        """The servers that an update goes to."""
        assert self._updating is None, "one update at a time"
        self._updating = self.serving()
        self.num_updates += 1
        self.is_closed_to_new = is_drained
        return list(self._updating)

    def in_update(self) -> list[Server]:
        """Those of them that still take part."""
        return list(self._updating or [])

    def commit(self, version: int) -> None:
        """Every server that still takes part has acknowledged the weights of this version."""
        self.version = version
        for server in self._updating or []:
            server.version = version
        for server in self.servers:
            if server.state == "serving" and server not in (self._updating or []):
                self.missed_update(server, f"it has missed version {version}")

    def end_update(self) -> None:
        """The servers go on."""
        self._updating = None
        self.num_updates += 1
        self.is_closed_to_new = False

    def synced(self, server: Server, version: int) -> None:
        """The server alone was given the weights of the committed version."""
        assert version == self.version
        server.has_missed_update = False
        self.heard(server, version)

    def describe(self) -> str:
        """In words, where each server stands."""
        return "; ".join(
            f"{server.address} serves {server.running} requests"
            if server.state == "serving"
            else f"{server.address} is {server.state}: {server.reason.rstrip('.')}"
            for server in self.servers
        )

    def _is_current(self, version: int | None, asked_at: int | None) -> bool:
        if self.version < 0:
            return True  # nothing was pushed yet: whoever asks now is told by the reply's versions
        if self.is_pusher or version is None:
            return version == self.version
        return (self.version if asked_at is None else asked_at) <= version <= self.version + 1

    def _leave_update(self, server: Server) -> None:
        if self._updating and server in self._updating:
            self._updating.remove(server)
            server.has_missed_update = True  # maybe half of it has arrived
