"""Notices a server that died or hangs, and one that is back.

`/health` is fine while the engine hangs, so each probe is a round trip to the engine, and the
server's own token counters show whether it gets anything done.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from arealite.errors import ServerError
from arealite.inference.connection import (
    Connection,
    NoAnswerError,
    RetryableError,
    ServerLostError,
    TooManyFilesError,
)
from arealite.inference.fleet import Fleet, Server
from arealite.inference.pusher import Pusher

PROBE_EVERY_S = 1.0
COUNT_EVERY_S = 5.0
SYNC_AGAIN_S = 5.0
"""After a server did not take the weights."""


@dataclass(slots=True)
class Counts:
    """A server's own counters, since it started."""

    tokens: float = 0.0  # of prompts and responses
    running: float = 0.0  # requests it works on now
    queued: float = 0.0  # and those that wait for it
    prefix_queries: float = 0.0  # prompt tokens that were looked up in its cache
    prefix_hits: float = 0.0  # those that were found


class _WeightInfo(msgspec.Struct):
    weight_version: str


class Monitor:
    """Watches every server of a fleet, each in a task of its own.

    Args:
        hang_timeout_s: silence of an engine after which its server is given up.
        progress_timeout_s: the same for a server that has requests, but samples no token.
        changed: called on the event loop whenever a server may have begun to serve.
    """

    def __init__(
        self,
        fleet: Fleet,
        connections: dict[Server, Connection],
        pusher: Pusher,
        *,
        hang_timeout_s: float,
        progress_timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._fleet = fleet
        self._connections = connections
        self._pusher = pusher
        self._hang_timeout_s = hang_timeout_s
        self._progress_timeout_s = progress_timeout_s
        self._changed = changed
        self._suspected = {server: asyncio.Event() for server in fleet.servers}
        self._counts = {server: Counts() for server in fleet.servers}
        self._totals = Counts()
        self.num_lost = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for server in self._fleet.servers:
                tasks.create_task(self._watch(server))
                tasks.create_task(self._count(server))

    def suspect(self, server: Server) -> None:
        """Probe the server at once: a request to it has just failed."""
        self._suspected[server].set()

    def lost(self, server: Server, reason: str) -> None:
        """Give the server up: its requests go elsewhere."""
        if server.state != "down":
            self.num_lost += 1
            sentence = reason.split(". ")[0].rstrip(".")
            print(f"warning: {server.address} is given up: {sentence}.", flush=True)
        self._fleet.lost(server, reason)
        self._pusher.forget(server)
        self._counts[server] = Counts()
        self._connections[server].give_up(reason)

    def take_prefix_counts(self) -> tuple[float, float]:
        """Prompt tokens found in the servers' caches, and looked up, since the last call."""
        totals, self._totals = self._totals, Counts()
        return totals.prefix_hits, totals.prefix_queries

    async def _watch(self, server: Server) -> None:
        while True:
            await self.probe(server)
            if server.state == "stale":
                try:
                    await self._pusher.sync(server)
                except Exception as error:  # a full disk, say: it stays stale, and is tried again
                    self._fleet.missed_update(server, str(error))
                self._changed()
            suspected = self._suspected[server]
            suspected.clear()
            is_refusing = server.state == "stale" and self._fleet.is_pusher
            pause_s = SYNC_AGAIN_S if is_refusing else PROBE_EVERY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):  # wait_for may swallow a cancellation
                    await suspected.wait()

    async def probe(self, server: Server) -> None:
        """One round trip to the engine; tells the fleet what came of it."""
        num_updates, asked_at = self._fleet.num_updates, self._fleet.version
        limit_s = max(1.0, self._hang_timeout_s - 2 * PROBE_EVERY_S)
        try:
            async with asyncio.timeout(limit_s + PROBE_EVERY_S):
                info = await self._weight_info(server, limit_s)
        except (ServerLostError, TooManyFilesError):
            return  # which says nothing about the server
        except (NoAnswerError, TimeoutError):
            self.lost(server, f"its engine did not answer for {limit_s:.0f} s (/health may)")
        except ServerError as error:
            self.lost(server, str(error))
        else:
            if num_updates == self._fleet.num_updates and not self._fleet.is_updating:
                self._fleet.heard(server, info, asked_at=asked_at)
            if server.state == "serving":
                self._changed()

    async def _weight_info(self, server: Server, limit_s: float) -> int | None:
        """Version of the server's weights; None for those of its model folder."""
        connection = self._connections[server]
        try:
            content = await connection.get("/weight_info", limit_s=limit_s)
        except (NoAnswerError, ServerLostError, TooManyFilesError):
            raise
        except RetryableError as error:
            # One reset or one 500 is no death; a dead engine gives the same answer again.
            await asyncio.sleep(min(max(0.3, error.wait_s), PROBE_EVERY_S))
            content = await connection.get("/weight_info", limit_s=limit_s)
        try:
            version = msgspec.json.decode(content, type=_WeightInfo).weight_version
        except (msgspec.MsgspecError, ValueError) as error:
            raise ServerError(f"/weight_info answered {content[:80]!r}") from error
        return int(version) if version.isascii() and version.isdigit() else None

    async def _is_paused(self, server: Server) -> bool:
        """Whether another process has paused the server, for an update that takes long."""
        try:
            content = await self._connections[server].get("/is_paused", limit_s=COUNT_EVERY_S)
            return bool(msgspec.json.decode(content)["is_paused"])
        except (ServerError, msgspec.MsgspecError, LookupError, TypeError):
            return False

    async def _count(self, server: Server) -> None:
        """Read the server's counters now and then; give it up if it works, but gets nowhere."""
        since = time.monotonic()
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            if server.state != "serving":
                since = time.monotonic()
                continue
            try:
                content = await self._connections[server].get("/metrics", limit_s=COUNT_EVERY_S)
            except ServerError:
                continue  # the probe decides
            counts, before = _read_counts(content.decode(errors="replace")), self._counts[server]
            self._totals.prefix_hits += max(0.0, counts.prefix_hits - before.prefix_hits)
            self._totals.prefix_queries += max(0.0, counts.prefix_queries - before.prefix_queries)
            self._counts[server] = counts
            has_forgotten = not counts.running and not counts.queued and server.running > 0
            is_at_work = bool(counts.running) or has_forgotten
            if counts.tokens != before.tokens or not is_at_work or self._fleet.is_updating:
                since = time.monotonic()
            elif time.monotonic() - since <= self._progress_timeout_s:
                continue
            elif await self._is_paused(server):
                since = time.monotonic()
            elif has_forgotten:
                reason = f"it has no requests, but did not answer {server.running}"
                print(f"warning: {server.address}: {reason}. They are asked again.", flush=True)
                self._connections[server].give_up(reason)
                since = time.monotonic()
            else:
                self._fleet.missed_update(server, "it must show that it generates")
                self.lost(
                    server,
                    f"it has {counts.running:.0f} requests, but sampled no token for "
                    f"{time.monotonic() - since:.0f} s",
                )


_FIELDS = {
    "vllm:generation_tokens_total": "tokens",
    "vllm:prompt_tokens_total": "tokens",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "queued",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
}


def _read_counts(text: str) -> Counts:
    """The counters we need from Prometheus' text format; engines of one server are added up."""
    counts = Counts()
    for line in text.splitlines():
        field = _FIELDS.get(line.partition("{")[0])
        if field is not None:
            try:
                setattr(counts, field, getattr(counts, field) + float(line.rpartition(" ")[2]))
            except ValueError:
                continue
    return counts
