"""New weights for every server of a fleet, and for each that comes back without them.

    keep ──> pause ──> init, start, update ..., finish ──> commit ──> resume    all that serve
                                        └──> a server that fails is left out, and synced alone later

An update commits its version when every server that still serves has acknowledged all of it.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from arealite import background
from arealite.errors import ServerError
from arealite.inference.connection import Connection, NoConnectionError
from arealite.inference.fleet import Fleet, Server
from arealite.inference.transport import NamedWeights, Transport

CONTROL_TIMEOUT_S = 120.0
"""Limit of each single call that pauses, updates or resumes a server."""
DYING_S = 5.0
"""So long a server may answer after the death of its engine; then it has a fault of its own."""
CANARY = {"token_ids": [1] * 8, "sampling_params": {"max_tokens": 2, "logprobs": 0}}
"""At least eight tokens: a first prompt of one has been seen to kill a CPU worker."""
CANARY_TIMEOUT_S = 15.0
"""Short, because no update of the other servers can begin meanwhile."""

NO_BODIES: Mapping[Server, Any] = MappingProxyType({})

Interrupt = Literal["keep", "drain"]
Kv = Literal["recompute", "reuse"]


class Pusher:
    """The one that changes what servers serve; only one update or sync at a time.

    Args:
        drain_timeout_s: limit of a pause that waits for running requests to end.
        may_sleep: whether trainers put these servers to sleep.
        lost: called on the event loop with a server that is gone, and the reason.
        probe: finds out whether a server has an engine that works.
    """

    def __init__(
        self,
        fleet: Fleet,
        connections: dict[Server, Connection],
        *,
        interrupt: Interrupt,
        kv: Kv,
        drain_timeout_s: float,
        may_sleep: bool,
        lost: Callable[[Server, str], None],
        probe: Callable[[Server], Awaitable[None]],
    ) -> None:
        self._fleet = fleet
        self._connections = connections
        self._lost = lost
        self._probe = probe
        self._pause_path = _pause_path(interrupt, kv)
        self._sleep_path = f"/sleep?level=1&mode={_pause_mode(interrupt)}"
        self._is_drained = interrupt == "drain"
        self._pause_timeout_s = drain_timeout_s if self._is_drained else CONTROL_TIMEOUT_S
        self._transport: Transport | None = None
        self._introduced = set[Server]()  # servers that know the transport
        self._may_sleep = may_sleep
        self._asleep = set(fleet.servers if may_sleep else ())  # as far as we know
        self._kept_version = -1  # of what the transport keeps; -1 while that is nothing whole
        self._turn = asyncio.Lock()

    # --- Main thread ------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop the servers, as `interrupt` says; one that does not take part is left out."""
        self._run(self._pause(), self._pause_timeout_s + CONTROL_TIMEOUT_S, "pausing the servers")

    def keep(self, weights: NamedWeights, transport: Transport) -> None:
        """Copy the weights of the next `push`, while servers still generate, if nobody has paused.

        If that fails, they go on as before; but there is nothing for one that comes back.
        """
        with self._no_sync():
            self._transport, self._kept_version = transport, -1
            transport.keep(weights)

    def push(self, version: int) -> None:
        """Give the weights that were kept to every server that takes part in the update."""
        self._fleet.is_pusher = True
        try:
            self._send(self._fleet.in_update(), version)
        except BaseException as error:  # half of it may have arrived: no server may go on with that
            reason = f"an update of it broke off ({type(error).__name__}: {error})"
            self._run(self._break_off(reason), CONTROL_TIMEOUT_S, "breaking off an update")
            raise
        self._kept_version = version
        self._run(self._commit(version), CONTROL_TIMEOUT_S, "committing a version")

    def sleep(self) -> None:
        """Pause, and let the servers give up the memory of their GPUs until weights come."""
        self.pause()
        self._asleep |= set(self._fleet.in_update())  # also one whose answer gets lost
        self._post_each(self._fleet.in_update(), self._sleep_path)

    def resume(self) -> None:
        """Let the servers go on; wakes those that sleep.

        Raises:
            ServerError: those that answer did not take the weights, and not when tried again. One
                whose engine has died may answer for a moment longer; then it is just gone.
        """
        self._run(self._resume(), 2 * CONTROL_TIMEOUT_S + 5, "resuming the servers")
        if self._fleet.serving():
            return
        until_s = time.monotonic() + DYING_S
        while self._is_still_stale():
            if time.monotonic() > until_s:
                raise ServerError(f"no server took the weights: {self._fleet.describe()}")
            time.sleep(0.5)

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        """Nobody reads what is kept; a pause has seen to that already."""
        if self._fleet.is_updating:
            yield
            return
        self._run(self._turn.acquire(), 8 * CONTROL_TIMEOUT_S, "the end of a server's update")
        try:
            yield
        finally:
            background.loop().call_soon_threadsafe(self._turn.release)

    def _is_still_stale(self) -> bool:
        """Whether servers answer and none serves, although they were tried again."""
        for server in self._fleet.servers:
            self._run(self.sync(server), 8 * CONTROL_TIMEOUT_S, "a second try to push the weights")
            if server.state == "stale":  # or its engine is dead, which comes back without our help
                self._run(self._probe(server), CONTROL_TIMEOUT_S, "a server that takes no weights")
        states = {server.state for server in self._fleet.servers}
        return "stale" in states and "serving" not in states

    # --- Event loop -------------------------------------------------------------------------------

    async def sync(self, server: Server) -> None:
        """Give the committed weights to one server alone; it stays stale where that fails."""
        async with self._turn:
            version = self._fleet.version
            if server.state != "stale" or not 0 <= version == self._kept_version:
                return
            if not await asyncio.to_thread(self._sync, server, version):
                # Its requests are frozen for who knows how long: they go elsewhere.
                self._connections[server].give_up("it did not take the weights")
            elif server.state == "stale":
                self._fleet.synced(server, version)

    def forget(self, server: Server) -> None:
        """The server is gone: what comes back in its place knows nothing."""
        self._introduced.discard(server)
        if self._may_sleep:  # or has only been out of reach; to wake one that is awake is no harm
            self._asleep.add(server)

    async def _pause(self) -> None:
        await self._turn.acquire()
        try:
            await self._wake(self._fleet.serving())  # put to sleep by a trainer that died
            servers = self._fleet.begin_update(is_drained=self._is_drained)
            await self._each(servers, self._pause_path, limit_s=self._pause_timeout_s)
        except BaseException:
            self._fleet.end_update()
            self._turn.release()
            raise

    async def _commit(self, version: int) -> None:
        self._fleet.commit(version)

    async def _break_off(self, reason: str) -> None:
        for server in self._fleet.in_update():
            self._fleet.missed_update(server, reason)

    async def _resume(self) -> None:
        try:
            await self._wake(self._fleet.in_update())
            await self._each(self._fleet.in_update(), "/resume")
        finally:
            self._fleet.end_update()
            if self._turn.locked():
                self._turn.release()

    # --- Main thread, or a thread of `sync` -------------------------------------------------------

    def _sync(self, server: Server, version: int) -> bool:
        """Whether the server has the weights and generates with them."""
        self._introduced.discard(server)
        # Paused also when nobody asks it: an update under a running request kills the engine.
        return bool(
            self._wake_now([server], "")
            and self._post_each([server], _pause_path("keep", "recompute"))
            and self._send([server], version)
            and self._post_each([server], "/resume")
            and self._post_each(
                [server], "/inference/v1/generate", {server: CANARY}, limit_s=CANARY_TIMEOUT_S
            )
        )

    def _send(self, servers: list[Server], version: int) -> list[Server]:
        """The servers that acknowledged every part; the others are stale or down."""
        assert self._transport is not None
        left = self._wake_now(servers, "weights")
        new = {
            server: {"init_info": self._transport.init_info(server)}
            for server in left
            if server not in self._introduced
        }
        left = self._run(self._open(left, new), 4 * CONTROL_TIMEOUT_S, "opening a weight update")
        for messages in self._transport.updates(left):
            told = {
                server: {"update_info": message}
                for server, message in messages.items()
                if server in left
            }
            answered = self._post_each(list(told), "/update_weights", told)
            left = [server for server in left if server not in told or server in answered]
        finish = {server: {"weight_version": str(version)} for server in left}
        return self._post_each(left, "/finish_weight_update", finish)

    def _wake_now(self, servers: list[Server], part: str) -> list[Server]:
        return self._run(self._wake(servers, part), 2 * CONTROL_TIMEOUT_S + 5, "waking the servers")

    def _post_each(
        self,
        servers: list[Server],
        path: str,
        bodies: Mapping[Server, Any] = NO_BODIES,
        *,
        limit_s: float = CONTROL_TIMEOUT_S,
    ) -> list[Server]:
        if not servers:
            return []
        calls = self._each(servers, path, bodies, limit_s=limit_s)
        return self._run(calls, 2 * limit_s + 5, f"{path} on {len(servers)} servers")

    # --- Both -------------------------------------------------------------------------------------

    async def _wake(self, servers: list[Server], part: str = "") -> list[Server]:
        """The servers without those that did not wake; with a part, the rest sleeps on."""
        asleep = [server for server in servers if server in self._asleep]
        woken = set(await self._each(asleep, f"/wake_up?tags={part}" if part else "/wake_up"))
        if not part:
            self._asleep -= woken
        return [server for server in servers if server not in asleep or server in woken]

    async def _open(self, servers: list[Server], new: Mapping[Server, Any]) -> list[Server]:
        """Start an update of those that answer; the new ones are introduced first."""
        known = await self._each(list(new), "/init_weight_transfer_engine", new)
        self._introduced |= set(known)
        ready = [server for server in servers if server in self._introduced]
        outcomes = await asyncio.gather(*map(self._open_one, ready))
        return [server for server, is_open in zip(ready, outcomes, strict=True) if is_open]

    async def _open_one(self, server: Server) -> bool:
        """Start an update; first close the one that a trainer may have left open when it died."""
        try:
            await self._post(server, "/start_weight_update", {}, CONTROL_TIMEOUT_S)
        except ServerError:
            abandon = {"update_info": {"is_abandoned": True}}
            with contextlib.suppress(ServerError):  # its failure is what closes the update
                await self._post(server, "/update_weights", abandon, CONTROL_TIMEOUT_S)
            return bool(await self._each([server], "/start_weight_update"))
        return True

    async def _each(
        self,
        servers: list[Server],
        path: str,
        bodies: Mapping[Server, Any] = NO_BODIES,
        *,
        limit_s: float = CONTROL_TIMEOUT_S,
    ) -> list[Server]:
        """The servers that answered; the others have missed the update."""
        outcomes = await asyncio.gather(
            *(self._post(server, path, bodies.get(server, {}), limit_s) for server in servers),
            return_exceptions=True,
        )
        answered: list[Server] = []
        for server, outcome in zip(servers, outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                answered.append(server)
            elif isinstance(outcome, NoConnectionError):
                self._lost(server, str(outcome))
            elif isinstance(outcome, ServerError):
                self._fleet.missed_update(server, str(outcome))
            else:
                raise outcome
        return answered

    async def _post(self, server: Server, path: str, body: dict[str, Any], limit_s: float) -> None:
        content = msgspec.json.encode(body)
        try:
            await self._connections[server].post(path, content, limit_s=limit_s)
        except NoConnectionError:
            # A kept connection may break just when it is used again; a dead server refuses twice.
            await asyncio.sleep(0.1)
            await self._connections[server].post(path, content, limit_s=limit_s)

    def _run(self, coroutine: Any, timeout_s: float, what: str) -> Any:
        return background.run(coroutine, timeout_s=timeout_s, what=what)


def _pause_path(interrupt: Interrupt, kv: Kv) -> str:
    # Documented as ignored for keep; it is not: true recomputes the KV of running requests.
    clear_cache = "true" if kv == "recompute" or interrupt == "drain" else "false"
    return f"/pause?mode={_pause_mode(interrupt)}&clear_cache={clear_cache}"


def _pause_mode(interrupt: Interrupt) -> str:
    return "wait" if interrupt == "drain" else "keep"
