"""An asynchronous client of vLLM servers: tokens out with their log-probs and weight versions.

    request -> a serving server -> POST /inference/v1/generate -> checked ModelResponse
                └─ dies, hangs, fails: the request goes to another, or waits for one to come back
    weights -> copy -> pause -> start, update ..., finish -> resume, on every server

The servers run in processes of their own; vllm is imported here for `server.transport` ipc and nccl
alone.
"""

import asyncio
import concurrent.futures
import gc
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import msgspec
import tenacity
import torch

from arealite import background, dist
from arealite.errors import ConfigError, NoServerError, PromptTooLongError, ServerError
from arealite.inference.connection import (
    CLIENT_ID,
    Connection,
    NoAnswerError,
    RefusedError,
    RetryableError,
    ServerBusyError,
    ServerLostError,
)
from arealite.inference.fleet import Fleet, Server
from arealite.inference.monitor import Monitor
from arealite.inference.pusher import Pusher
from arealite.inference.reply import StaleReplyError, UnreadableReplyError, parse_reply
from arealite.inference.server import ServerConfig, Servers, check_addresses
from arealite.inference.transport import Disk, SharedMemory, Transport
from arealite.inference.turns import Spread
from arealite.types import ModelRequest, ModelResponse
from arealite.waits import waiting

MAX_ATTEMPTS = 5
"""Of one request, while its server is there."""
MAX_LOST_SERVERS = 5
"""A request whose servers died so often may be the reason."""
SLOW_FACTOR = 10
"""A request that takes so many times as long as nine in ten of late is asked again."""

STARTS_PER_TURN = 16
"""Requests that begin in one turn of the event loop: 2 ms, with a connection for each."""
READING_S = 0.0005
"""Out of each turn of the loop, for replies that have arrived together."""

USUAL_THRESHOLD, OUR_THRESHOLD = gc.get_threshold()[2], 1000
"""Of Python's garbage collector, for looking through all; ours is for who never pushes weights."""


class _ModelInfo(msgspec.Struct):
    """What our guard on a server tells about it."""

    vocab_size: int | None = None
    max_num_seqs: int | None = None
    num_workers: int = 1
    weights_dir: str | None = None


class VLLMEngine:
    """`InferenceEngine` over running vLLM servers. Use it as a context manager, or close it.

    Until then garbage collection leaves out what exists now, and looks through all of the rest only
    when weights are pushed: with thousands of requests in flight it holds up replies.

    Args:
        servers: what `serve()` gives, or `http://host:port` of each server.
        cfg: limits and the kind of interruption, for servers given by address.

    Raises:
        ServerError: no server answers at an address, or it was not started by `serve`.
    """

    def __init__(self, servers: Servers | Sequence[str], cfg: ServerConfig | None = None) -> None:
        if not isinstance(servers, Servers):
            check_addresses(servers)
            servers = Servers([address.rstrip("/") for address in servers], cfg or ServerConfig())
        self._servers, self._cfg = servers, servers.cfg
        self._fleet = Fleet(servers.addresses)
        self._connections = {
            server: Connection(
                server.address, token=servers.token, max_reply_bytes=self._cfg.max_reply_bytes
            )
            for server in self._fleet.servers
        }
        self._pusher = Pusher(
            self._fleet,
            self._connections,
            interrupt=self._cfg.interrupt,
            kv=self._cfg.kv,
            drain_timeout_s=self._cfg.request_timeout_s,
            may_sleep=self._cfg.sleep,
            lost=lambda server, reason: self._monitor.lost(server, reason),
            probe=lambda server: self._monitor.probe(server),
        )
        self._monitor = Monitor(
            self._fleet,
            self._connections,
            self._pusher,
            hang_timeout_s=self._cfg.hang_timeout_s,
            progress_timeout_s=self._cfg.progress_timeout_s,
            changed=self._let_requests_look_again,
        )
        self._watching: concurrent.futures.Future[None] | None = None
        self._transport: Transport | None = None
        self._asleep_since_s: float | None = None
        self._slept_s = 0.0
        self._look_again = asyncio.Event()
        self._starting = Spread(per_turn=STARTS_PER_TURN)
        self._reading = Spread(slice_s=READING_S)
        self._durations_s = deque[float](maxlen=256)
        self._num_durations = 0
        self._usual_s = math.inf
        self._num_retries = 0
        self._rests_until_s: dict[Server, float] = {}
        self._request_numbers = itertools.count()
        self._retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((RetryableError, UnreadableReplyError)),
            stop=self._has_asked_enough,
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        try:
            limits = background.run(self._connect(), timeout_s=60, what="connecting to the servers")
        except BaseException:
            self.close()
            raise
        self.max_model_len = min(length for length, _ in limits)
        """Prompt and response together may have this many tokens."""
        self._vocab_size = min((size for _, size in limits if size), default=None)
        self._watching = background.submit(self._monitor.run())
        self._watching.add_done_callback(self._end_requests)
        # Looking through all that torch and transformers have made would hold up every reply.
        gc.freeze()
        gc.set_threshold(*gc.get_threshold()[:2], OUR_THRESHOLD)

    @property
    def version(self) -> int:
        """Version of the weights that new requests are served with; -1 before the first push."""
        return self._fleet.version

    @version.setter
    def version(self, version: int) -> None:
        if version != self._fleet.version:  # another rank has pushed
            gc.collect()
        if dist.rank() > 0:
            self._wake_up()
        self._fleet.version = version

    @property
    def room(self) -> int | None:
        """Requests more that the servers would work on at once, this rank's share of it.

        None if that is unknown: a server does not say, or none serves, and who asks finds out why.
        """
        if self._fleet.is_closed_to_new:
            return 0
        serving = self._fleet.serving()
        capacities = [server.capacity for server in serving if server.capacity is not None]
        if not serving or len(capacities) < len(serving):
            return None
        running = sum(server.running for server in serving)
        return max(1, sum(capacities) // dist.world_size()) - running

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        """Sample one response; what a server fails at is asked again, of another if there is one.

        Raises:
            PromptTooLongError: the context has no room for one more token.
            NoServerError: no server has served for a while, and none will.
            ServerError: a server refused the request, or none gave a usable answer.
            TrajectoryError: an answer whose tokens, log-probs and versions do not fit together.
        """
        if asyncio.get_running_loop() is not background.loop():  # a notebook's, say
            return await asyncio.wrap_future(background.submit(self.agenerate(request)))
        room = self.max_model_len - len(request.token_ids)
        if room < 1:
            raise PromptTooLongError(
                f"A prompt of {len(request.token_ids)} tokens leaves no room in a context of "
                f"{self.max_model_len}. Filter out long rows, or raise server.max_model_len "
                "(up to what the model allows)."
            )
        await self._starting.wait()
        budget = min(request.sampling.max_new_tokens, room)
        response = await self._generate(request, budget)
        if response.finish_reason == "length" and budget < request.sampling.max_new_tokens:
            return replace(response, finish_reason="context", request=request)
        return replace(response, request=request)

    def pause(self) -> None:
        """Stop the servers for an update, in the way of `server.interrupt`; once is enough.

        keep: running requests freeze in place, new ones queue. drain: running requests end first.
        """
        if not self._fleet.is_updating:
            self._pusher.pause()

    def sleep(self) -> None:
        """With `server.sleep`, servers stop and give the trainer their GPU memory. A collective.

        Until the next weights, or `resume`; requests have as much time left afterwards as before.
        """
        if not self._cfg.sleep:
            return
        failure = dist.broadcast(self._try_to_sleep() if dist.rank() == 0 else "")
        if failure:
            raise ServerError(f"The servers could not be put to sleep: {failure}")
        self._asleep_since_s = time.monotonic()
        self._tell_connections(Connection.stop_clocks)

    def resume(self) -> None:
        """Let the requests go on.

        Raises:
            ServerError: the servers answer, but did not take the weights.
        """
        if not self._fleet.is_updating:
            return
        self._make_room()
        try:
            self._pusher.resume()
        finally:
            self._wake_up()
            background.loop().call_soon_threadsafe(self._let_requests_look_again)

    def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Send full tensors, under their Hugging Face names, to every server that serves.

        Only the process that talks to the servers calls this; `push_weights` sees to it. It keeps
        a copy, so that a server that is restarted gets the weights before it serves again. Unless
        `pause` was called, servers stop only once that copy is made, and go on afterwards.
        """
        if self._transport is None:
            self._transport = self._make_transport()
        is_resumed = self._asleep_since_s is not None or not self._fleet.is_updating
        try:
            self._pusher.keep(weights, self._transport)
            gc.collect()
            self._make_room()
            self.pause()
            self._pusher.push(version)
        finally:
            if is_resumed:
                self.resume()

    def take_metrics(self) -> dict[str, float]:
        """What the servers went through since the last call; see `observe.metrics`."""
        hits, queries = self._monitor.take_prefix_counts()
        metrics = {
            "server/retries": float(self._num_retries),
            "server/lost": float(self._monitor.num_lost),
        }
        self._num_retries = self._monitor.num_lost = 0
        return metrics | ({"server/prefix_hit_rate": hits / queries} if queries else {})

    def close(self) -> None:
        """Close all connections. The servers stay; `serve()` owns them."""
        gc.set_threshold(*gc.get_threshold()[:2], USUAL_THRESHOLD)
        gc.unfreeze()
        watching, self._watching = self._watching, None  # first, so that requests see why
        if watching is not None:
            watching.cancel()
        background.run(self._disconnect(), timeout_s=10, what="closing connections")
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- One request ------------------------------------------------------------------------------

    async def _generate(self, request: ModelRequest, budget: int) -> ModelResponse:
        avoid: Server | None = None
        patience = 1  # the request may be one that takes longer than others

        async def attempt() -> ModelResponse:
            nonlocal avoid, patience
            for _ in range(MAX_LOST_SERVERS):
                server = await self._serving(request.conversation, avoid)
                try:
                    limit_s = self._limit_s(patience)
                    return await self._ask(
                        server, request, budget, limit_s=limit_s, may_reuse=avoid is None
                    )
                except (ServerLostError, StaleReplyError):
                    continue  # no fault of the request: it goes on elsewhere
                except (RetryableError, UnreadableReplyError) as error:
                    avoid = server
                    if isinstance(error, NoAnswerError):
                        patience *= 2
                    self._num_retries += 1
                    raise
            raise ServerError(
                f"{MAX_LOST_SERVERS} servers were lost, one after the other, while they worked on "
                f"one request of {len(request.token_ids)} tokens. Is it the reason?"
            )

        try:
            return await attempt()
        except (RetryableError, UnreadableReplyError):
            await asyncio.sleep(random.uniform(0.05, 0.15))
        return await self._retrying(attempt)

    async def _ask(
        self,
        server: Server,
        request: ModelRequest,
        budget: int,
        *,
        limit_s: float,
        may_reuse: bool,
    ) -> ModelResponse:
        """One answer of this server; what its failure says about the server is passed on."""
        request_id = f"{CLIENT_ID}-{next(self._request_numbers)}"
        body = _generate_body(request, budget) | {"request_id": request_id}
        if self._cfg.kv == "reuse":  # which is for requests that go on, not for new ones
            body["cache_salt"] = f"version {self.version}"
        # A process that does not push may not have heard yet that the server has missed an update.
        oldest_version = self.version if self.version >= 0 else server.version
        began_s = time.monotonic() - self._slept_s
        server.running += 1
        try:
            with waiting(f"a reply of {server.address}", alarm_after_s=math.inf):
                content = await self._connections[server].post(
                    "/inference/v1/generate",
                    msgspec.json.encode(body),
                    limit_s=limit_s,
                    echo=request_id.encode(),
                    may_reuse=may_reuse,
                )
            read = partial(
                parse_reply,
                content,
                vocab_size=self._vocab_size,
                oldest_version=oldest_version,
                latest_version=self.version + 1,
            )
            response = await self._reading.run(read)
        except StaleReplyError as error:
            if self.version < 0:
                raise ServerError(str(error)) from error
            self._fleet.missed_update(server, str(error))
            self._monitor.suspect(server)
            raise
        except RetryableError as error:
            if error.wait_s:
                self._rests_until_s[server] = time.monotonic() + error.wait_s
            self._monitor.suspect(server)
            raise
        finally:
            server.running -= 1
        self._learn_duration(time.monotonic() - self._slept_s - began_s)
        return response

    def _try_to_sleep(self) -> str:
        """Why the servers do not sleep; empty if they do."""
        if self._fleet.is_updating:  # they stand still already
            return ""
        try:
            self._pusher.sleep()
        except Exception as error:  # the other ranks wait to hear of it
            with suppress(Exception):
                self._pusher.resume()
            return f"{type(error).__name__}: {error}"
        return ""

    def _wake_up(self) -> None:
        """The clocks of requests go on."""
        if self._asleep_since_s is not None:
            self._slept_s += time.monotonic() - self._asleep_since_s
            self._asleep_since_s = None
            self._tell_connections(Connection.start_clocks)

    def _make_room(self) -> None:
        """Give back what torch only keeps in case it needs it: servers that wake take it."""
        if self._cfg.sleep and torch.cuda.is_available():
            torch.cuda.ipc_collect()  # what a server had mapped
            torch.cuda.empty_cache()

    def _tell_connections(self, what: Callable[[Connection], None]) -> None:
        def tell() -> None:
            for connection in self._connections.values():
                what(connection)

        background.loop().call_soon_threadsafe(tell)

    def _has_asked_enough(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, ServerBusyError):  # paused by another process, until requests ended
            is_drained = self._cfg.interrupt == "drain"
            limit_s = self._cfg.request_timeout_s if is_drained else self._cfg.patience_s
            return (state.seconds_since_start or 0.0) > limit_s
        if isinstance(error, RefusedError):  # by then the monitor has given the server up
            return (state.seconds_since_start or 0.0) > 2 * self._cfg.hang_timeout_s
        return state.attempt_number >= MAX_ATTEMPTS

    def _limit_s(self, patience: int) -> float:
        """How long a request may take: much longer than those before it, but not for ever."""
        limit_s = patience * max(self._cfg.patience_s, SLOW_FACTOR * self._usual_s)
        return min(limit_s, self._cfg.request_timeout_s)

    def _learn_duration(self, duration_s: float) -> None:
        self._durations_s.append(duration_s)
        self._num_durations += 1
        if self._num_durations % 16 == 0:
            self._usual_s = sorted(self._durations_s)[len(self._durations_s) * 9 // 10]

    async def _serving(self, conversation: int | None, avoid: Server | None) -> Server:
        """A server to ask, as soon as there is one."""
        has_ended = self._watching is None or self._watching.done()
        server = self._fleet.choose(conversation, avoid, self._resting())
        if server is not None and not has_ended:
            return server
        began_s = time.monotonic()
        with waiting(self._what_is_awaited):
            while (
                server := self._fleet.choose(conversation, avoid, self._resting())
            ) is None or has_ended:
                self._check_hope(0.0 if self._resting() else time.monotonic() - began_s)
                # Not asyncio.wait_for, which before Python 3.12 may swallow a cancellation.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._until_rested_s()):
                        await self._look_again.wait()
        return server

    def _resting(self) -> list[Server]:
        """Servers that serve, but asked to be left alone for a while."""
        now_s = time.monotonic()
        self._rests_until_s = {
            server: until_s for server, until_s in self._rests_until_s.items() if until_s > now_s
        }
        return [server for server in self._rests_until_s if server.state == "serving"]

    def _until_rested_s(self) -> float:
        """Seconds until the next look at the servers; not the same for all requests."""
        ends_s = [until_s - time.monotonic() for until_s in self._rests_until_s.values()]
        return min([1.0, *(max(0.0, end_s) + random.uniform(0.01, 0.1) for end_s in ends_s)])

    def _what_is_awaited(self) -> str:
        resting = self._resting()
        if not resting:
            return "a server that serves"
        addresses = ", ".join(server.address for server in resting)
        return f"{addresses} to be ready again (it answered 429 or 503 with Retry-After)"

    def _check_hope(self, waited_s: float) -> None:
        """Raise if no server will come, however long a request waits."""
        if self._watching is None:
            raise ServerError("The engine was closed while a request was running.")
        if self._watching.done():
            raise NoServerError("Nobody watches the servers any more.") from (
                self._watching.exception()
            )
        if failure := self._servers.failure():
            raise NoServerError(failure)
        if waited_s > self._servers.recovery_timeout_s and not self._fleet.is_updating:
            raise NoServerError(
                f"No server has served for {waited_s:.0f} s: {self._fleet.describe()}."
                f"{self._servers.advice}"
            )

    def _end_requests(self, _: object) -> None:
        """Nobody would notice any more that their server dies."""

        def end() -> None:
            for connection in self._connections.values():
                connection.give_up("nobody watches it any more")
            self._let_requests_look_again()

        background.loop().call_soon_threadsafe(end)

    def _let_requests_look_again(self) -> None:
        self._look_again.set()
        self._look_again = asyncio.Event()

    # --- Connections ------------------------------------------------------------------------------

    async def _connect(self) -> list[tuple[int, int | None]]:
        limits = await asyncio.gather(*map(self._model_limits, self._fleet.servers))
        await asyncio.gather(*map(self._monitor.probe, self._fleet.servers))
        for server in self._fleet.servers:
            if server.state != "serving":
                raise ServerError(f"{server.address}: {server.reason}")
        return limits

    async def _model_limits(self, server: Server) -> tuple[int, int | None]:
        """Context length and vocabulary size of the served model; the latter if it says so."""
        try:
            content = await self._connections[server].get("/v1/models", limit_s=30)
            length = int(msgspec.json.decode(content)["data"][0]["max_model_len"])
        except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(
                f"{server.address} is not a vLLM server: /v1/models is not what vLLM answers."
            ) from error
        try:
            content = await self._connections[server].get("/arealite/model", limit_s=30)
            told = msgspec.json.decode(content, type=_ModelInfo)
        except (ServerError, msgspec.MsgspecError):
            return length, None
        server.capacity, server.num_workers = told.max_num_seqs, told.num_workers
        self._check_folder(server, told.weights_dir)
        return length, told.vocab_size

    def _check_folder(self, server: Server, allowed: str | None) -> None:
        """Raise ConfigError if the server will not read from the folder that weights go to."""
        if not self._cfg.weights_dir or allowed is None:
            return
        folder = Path(self._cfg.weights_dir).resolve()
        if not allowed or not folder.is_relative_to(allowed):
            raise ConfigError(
                f"server.weights_dir is {folder}, but {server.address} was started with "
                f"{allowed or 'none'}, and reads weights only from there. Start it with the same "
                "server.weights_dir."
            )

    def _make_transport(self) -> Transport:
        name = self._cfg.transport
        if name == "disk" or (name == "auto" and self._cfg.weights_dir):
            return Disk(self._cfg.weights_dir)
        if name != "nccl" and not all(map(_is_local, self._servers.addresses)):
            raise ServerError(
                "Servers on other hosts take weights through a folder that both sides see, or from "
                "GPU to GPU: set server.weights_dir, or server.transport=nccl."
            )
        return _transport_between_gpus(name) if name in ("ipc", "nccl") else SharedMemory()

    async def _disconnect(self) -> None:
        for connection in self._connections.values():
            await connection.close()


def _generate_body(request: ModelRequest, budget: int) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "token_ids": request.token_ids,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": budget,
            "ignore_eos": sampling.ignore_eos,
            "logprobs": 0,
            "stop": sampling.stop,
            "detokenize": bool(sampling.stop),
        },
    }


def _transport_between_gpus(name: Literal["ipc", "nccl"]) -> Transport:
    if not torch.cuda.is_available():
        raise ConfigError(f"server.transport={name} needs a GPU; auto does without.")
    if name == "ipc" and dist.world_size() > 1:
        raise ConfigError(
            "server.transport=ipc is for a trainer of one rank, on the GPU of its servers; "
            "auto is for all."
        )
    try:
        from arealite.inference.vllm_transport import VLLMTransport  # imports vLLM, for seconds
    except ImportError as error:
        raise ConfigError(
            f"server.transport={name} needs vLLM beside the trainer too ({error}). Install "
            '"arealite[vllm]" there, or set server.weights_dir instead.'
        ) from error

    return VLLMTransport(name, torch.device("cuda", torch.cuda.current_device()))


def _is_local(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme == "unix" or parts.hostname in ("127.0.0.1", "localhost", "::1")
