"""What a request costs the process that asks: `VLLMEngine` beside bare aiohttp and httpx.

    python benchmarks/client.py                 # all cells, under three minutes on two cores
    python benchmarks/client.py --rounds 1      # a quick look

A server in a process of its own holds every request until it is told to answer some, so that 256
or 2,000 requests are in flight from the first reply of a turn to its last: a client that gets a
reply asks again at once. The replies are vLLM's, field by field, of 256 or 16,384 tokens with their
log-probs (36 KB and 2.3 MB), made before the clock starts; a client that accepts it gets what our
guard on a server makes of them (3 KB and 197 KB). Several are on their way at the same
time, as from a fleet of `SENDING` servers, but nothing paces them: they come as fast as the client
reads, and a turn is one burst of `BURST` replies.

Clients take turns on the same event loop, in a process of their own for all of them, with warm
connections and without a limit on their number; a cell has several rounds of turns.

- CPU: `time.process_time` of the whole client process over the replies of a turn, so threads and
  garbage collection are in it, and the server is not. The figure is the median over the rounds; the
  ratio is the median of the ratios within a round.
- Stall: a task on the same loop sleeps 1 ms, again and again, from before all requests start at
  once until the last reply of the turn. `late` is the latest it ever woke; `stall` leaves out the
  time in which the loop's thread could have run but had no core, because other processes had them.
  `gc` is the longest single garbage collection.
- Sockets: open file descriptors when a client has closed, less those before it was made.

`bare aiohttp` posts and reads the bytes of vLLM's reply, nothing else; `+ json` also parses them
with the standard library; `compact` reads the bytes that our guard sends. `VLLMEngine, no guard`
talks to a server that was not started by `arealite serve` and so sends JSON. The last line is JSON:
`cpu_ratio` is the largest ratio of `VLLMEngine` to bare aiohttp in any cell, `cpu_ratio_no_guard`
that without the guard, `cpu_ratio_same_bytes` that to `bare aiohttp, compact`; `max_stall_ms` is
the longest stall of an engine, with or without the guard, `leaked_sockets` what both left open.
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import resource
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from typing import Any, Self

import aiohttp
import httpx

from arealite import background
from arealite.inference.reply_formats import COMPACT, compact
from arealite.inference.vllm import VLLMEngine
from arealite.types import ModelRequest, SamplingParams

TOKENS, IN_FLIGHT = (256, 16_384), (256, 2_000)
BURST = {256: 2_000, 16_384: 128}
"""Replies in one turn, by their number of tokens."""
SENDING = 8
ROUNDS = 5
PROMPT = list(range(1_000, 1_128))
VOCAB_SIZE = 151_936
MAX_MODEL_LEN = 32_768
GENERATE = "/inference/v1/generate"
REQUEST_ID = b"0123456789abcdef-000000"
"""In a reply its place, for which the server puts the one it was sent."""
PROBE_S = 0.001
TURN_TIMEOUT_S = 120.0

Ask = Callable[[], Awaitable[object]]


# --- The server: holds requests until it is told to answer ----------------------------------------


def generate_reply(num_tokens: int) -> dict[str, Any]:
    """What vLLM 0.32 answers with `logprobs: 0`: `GenerateTokensResponse`, nulls included."""
    draw = random.Random(num_tokens)
    token_ids = [draw.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
    entries = [
        {"token_id": token_id, "logprob": as_float32(-draw.expovariate(2)), "rank": 1}
        for token_id in token_ids
    ]
    usage = {"prompt_tokens": len(PROMPT), "total_tokens": len(PROMPT) + num_tokens}
    usage |= {"completion_tokens": num_tokens}
    choice = {
        "index": 0,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": token_ids,
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": [{"version": "0", "start": 0, "end": num_tokens}],
        "logprobs": {"content": [entry | {"top_logprobs": [entry]} for entry in entries]},
    }
    reply = {"request_id": f"generate-tokens-{REQUEST_ID.decode()}", "model": "served"}
    reply |= {"created": 1_767_225_600}
    reply |= {"usage": usage | {"prompt_tokens_details": None, "completion_tokens_details": None}}
    reply |= dict.fromkeys(("prompt_logprobs", "prompt_token_id_logprobs", "prompt_token_ids"))
    reply |= dict.fromkeys(("mm_placeholders", "metrics"))
    reply |= dict.fromkeys(("kv_transfer_params", "ec_transfer_params"))
    return reply | {"output_mode": "tokens", "choices": [choice]}


def as_float32(value: float) -> float:
    """The value with the precision that log-probs have, and so with as many digits."""
    return struct.unpack("f", struct.pack("f", value))[0]


def http(body: bytes, status: str = "200 OK", media_type: str = "application/json") -> bytes:
    """A whole reply, with the headers that uvicorn sends."""
    head = f"HTTP/1.1 {status}\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    head += f"content-length: {len(body)}\r\ncontent-type: {media_type}\r\n\r\n"
    return head.encode() + body


def encode(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


class HoldingServer:
    """Takes requests of `GENERATE` and commands on standard input, one a line.

    `hold N GUARDED` ends all connections, holds the requests that come on new ones, and prints a
    line once there are N; GUARDED is 1 for a server with our guard. `answer N TOKENS` answers the
    next N, the oldest first.
    """

    def __init__(self) -> None:
        self._replies = {tokens: encode(generate_reply(tokens)) for tokens in TOKENS}
        self._compacted = {reply: compact(reply) or b"" for reply in self._replies.values()}
        self._is_guarded = True
        self._routes = {
            "/v1/models": encode({"data": [{"id": "served", "max_model_len": MAX_MODEL_LEN}]}),
            "/arealite/model": encode({"vocab_size": VOCAB_SIZE}),
            "/weight_info": encode({"weight_version": "0"}),
            "/metrics": b"",
        }
        self._held = deque[asyncio.Future[bytes]]()
        self._announce_at = 0
        self._answers: Iterator[bytes] = iter(
            ()
        )  # for requests that come, before any is held again
        self._sending = asyncio.Semaphore(SENDING)
        self._conversations = set[asyncio.Task[None]]()

    async def run(self) -> None:
        """Serve until standard input ends."""
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0), backlog=4_096) as listener:
            listener.setblocking(False)
            print(listener.getsockname()[1], flush=True)
            accepting = asyncio.create_task(self._accept(listener))
            commands = asyncio.StreamReader()
            await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(commands), sys.stdin.buffer
            )
            while line := await commands.readline():
                self._obey(*line.decode().split())
            accepting.cancel()

    def _obey(self, command: str, *arguments: str) -> None:
        match command, *map(int, arguments):
            case "hold", count, is_guarded:
                self._is_guarded = bool(is_guarded)
                for conversation in self._conversations:
                    conversation.cancel()
                self._held.clear()
                self._answers, self._announce_at = iter(()), count
            case "answer", count, tokens:
                self._answers = itertools.repeat(self._replies[tokens], count)
                while self._held and (reply := next(self._answers, b"")):
                    self._held.popleft().set_result(reply)

    def _announce(self) -> None:
        if self._announce_at and len(self._held) >= self._announce_at:
            self._announce_at = 0
            print("held", flush=True)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conversation = asyncio.create_task(self._talk(connection))
            self._conversations.add(conversation)
            conversation.add_done_callback(self._conversations.discard)

    async def _talk(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection, contextlib.suppress(ConnectionError):
            while request := await next_request(connection):
                path, head, body = request
                if path == GENERATE:
                    content = next(self._answers, b"") or await self._hold()
                    is_compact = self._is_guarded and COMPACT in head
                    async with self._sending:
                        await loop.sock_sendall(connection, self._reply(content, body, is_compact))
                elif path in self._routes:
                    await loop.sock_sendall(connection, http(self._routes[path]))
                else:
                    await loop.sock_sendall(connection, http(b"", "404 Not Found"))

    def _reply(self, content: bytes, request: bytes, is_compact: bool) -> bytes:
        request_id = json.loads(request)["request_id"].ljust(len(REQUEST_ID)).encode()
        if is_compact:
            content = self._compacted[content].replace(REQUEST_ID, request_id)
            return http(content, media_type=COMPACT)
        return http(content.replace(REQUEST_ID, request_id, 1))

    async def _hold(self) -> bytes:
        reply = asyncio.get_running_loop().create_future()
        self._held.append(reply)
        self._announce()
        return await reply


async def next_request(connection: socket.socket) -> tuple[str, str, bytes] | None:
    """Path, head and body of the next request; None at the end."""
    loop = asyncio.get_running_loop()
    received = b""
    while b"\r\n\r\n" not in received:
        part = await loop.sock_recv(connection, 65_536)
        if not part:
            return None
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    _, _, length = head.lower().partition(b"content-length:")
    while len(body) < int(length.split(b"\r\n")[0] or 0):
        part = await loop.sock_recv(connection, 65_536)
        if not part:
            return None
        body += part
    return head.split(b" ")[1].decode(), head.decode(), body


class ServerProcess:
    """The benchmark's handle of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = f"http://127.0.0.1:{self._answer()}"

    def tell(self, command: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def wait_until_held(self) -> None:
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        assert line, "the server of this benchmark has died"
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


# --- The clients ----------------------------------------------------------------------------------

SAMPLING = SamplingParams(max_new_tokens=TOKENS[-1])
BODY = json.dumps(
    {
        "token_ids": PROMPT,
        "sampling_params": {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": SAMPLING.max_new_tokens,
            "ignore_eos": False,
            "logprobs": 0,
            "detokenize": False,
        },
        "request_id": REQUEST_ID.decode(),
    },
    separators=(",", ":"),
).encode()
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
KEEP_ALIVE_S = 4.0


@contextmanager
def engine(address: str) -> Iterator[Ask]:
    """The client of arealite."""
    request = ModelRequest(token_ids=PROMPT, sampling=SAMPLING)
    with VLLMEngine([address]) as inference_engine:
        yield lambda: inference_engine.agenerate(request)


@contextmanager
def bare_aiohttp(address: str, accept: str = "*/*") -> Iterator[Ask]:
    """Post, and read the bytes."""

    async def make_session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            headers=HEADERS | {"Accept": accept},
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def ask() -> bytes:
        async with session.post(address + GENERATE, data=BODY) as reply:
            return await reply.read()

    session = on_loop(make_session())
    try:
        yield ask
    finally:
        on_loop(session.close())


@contextmanager
def aiohttp_and_json(address: str) -> Iterator[Ask]:
    """The same, parsed with the standard library."""
    with bare_aiohttp(address) as read:

        async def ask() -> object:
            return json.loads(await read())  # type: ignore[arg-type]

        yield ask


@contextmanager
def bare_httpx(address: str) -> Iterator[Ask]:
    """Post, and read the bytes."""
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S
    )
    client = httpx.AsyncClient(limits=limits, timeout=None, headers=HEADERS, trust_env=False)

    async def ask() -> bytes:
        return (await client.post(address + GENERATE, content=BODY)).content

    try:
        yield ask
    finally:
        on_loop(client.aclose())


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """A way to ask, and how much of it fits into the time of this benchmark."""

    connect: Callable[[str], AbstractContextManager[Ask]]
    is_guarded: bool = True  # whether it asks a server with our guard
    is_slow: bool = False  # only one turn in a cell, of a tenth of the replies

    def burst(self, tokens: int) -> int:
        """Replies in one turn."""
        return BURST[tokens] // (10 if self.is_slow else 1)


CLIENTS = {
    "bare aiohttp": Client(connect=bare_aiohttp),
    "VLLMEngine": Client(connect=engine),
    "VLLMEngine, no guard": Client(connect=engine, is_guarded=False),
    "bare aiohttp, compact": Client(connect=partial(bare_aiohttp, accept=COMPACT)),
    "aiohttp + json": Client(connect=aiohttp_and_json, is_slow=True),
    "httpx": Client(connect=bare_httpx, is_slow=True),
}


ENGINES = ("VLLMEngine", "VLLMEngine, no guard")


# --- One turn of one client -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What was measured while one client got one burst of replies."""

    cpu_us: float  # per request
    late_ms: float  # longest time for which the loop did not turn
    stall_ms: float  # the same, without the time for which no core was free
    gc_ms: float  # longest garbage collection
    leaked_sockets: int


class Crowd:
    """So many requests of a client in flight, all the time, until it is stopped."""

    def __init__(self, ask: Ask, size: int) -> None:
        self._ask = ask
        self._until = 0
        self._reached = asyncio.Event()
        self._tasks = [asyncio.create_task(self._keep_asking()) for _ in range(size)]

    async def replies(self, count: int) -> None:
        """Return after so many replies from now on."""
        self._until = count
        await self._reached.wait()

    async def stop(self) -> None:
        """Give the requests up, and raise if one has failed before."""
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                raise outcome

    async def _keep_asking(self) -> None:
        try:
            while True:
                await self._ask()
                self._until -= 1
                if self._until == 0:
                    self._reached.set()
        finally:
            self._reached.set()  # by nobody else if a request has failed


class StallProbe:
    """Longest delay of a task that wants to run every millisecond."""

    def __init__(self) -> None:
        self.late_ms = 0.0
        self.stall_ms = 0.0
        self.gc_ms = 0.0
        self._gc_began_s = 0.0

    async def run(self) -> None:
        gc.callbacks.append(self._watch_gc)
        try:
            with open("/proc/thread-self/schedstat", "rb", buffering=0) as scheduler:
                while True:
                    began_s, queued_before_s = time.perf_counter(), queued_s(scheduler)
                    await asyncio.sleep(PROBE_S)
                    late_s = time.perf_counter() - began_s - PROBE_S
                    self.late_ms = max(self.late_ms, 1e3 * late_s)
                    stall_s = late_s - (queued_s(scheduler) - queued_before_s)
                    self.stall_ms = max(self.stall_ms, 1e3 * stall_s)
        finally:
            gc.callbacks.remove(self._watch_gc)

    def _watch_gc(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began_s = time.thread_time()
        else:
            self.gc_ms = max(self.gc_ms, 1e3 * (time.thread_time() - self._gc_began_s))


def queued_s(scheduler: RawIOBase) -> float:
    """How long, in all, a thread could have run but had no core; of its `schedstat`."""
    scheduler.seek(0)
    return int((scheduler.read(100) or b"").split()[1]) / 1e9


def take_turn(client: Client, server: ServerProcess, *, tokens: int, in_flight: int) -> Turn:
    """One burst of replies of so many tokens, with so many requests in flight."""
    gc.collect()  # what the client before left behind is not this one's
    num_files = open_files()
    server.tell(f"hold {in_flight} {client.is_guarded:d}")
    with client.connect(server.address) as ask:
        probe = StallProbe()
        probing = background.submit(probe.run())
        crowd = on_loop(gather(ask, in_flight))
        server.wait_until_held()
        cpu_us = on_loop(measure(crowd, server, tokens=tokens, burst=client.burst(tokens)))
        probing.cancel()
        on_loop(crowd.stop())
    on_loop(asyncio.sleep(0.1))  # a closed transport leaves its socket for the loop to close
    return Turn(
        cpu_us=cpu_us,
        late_ms=probe.late_ms,
        stall_ms=probe.stall_ms,
        gc_ms=probe.gc_ms,
        leaked_sockets=open_files() - num_files,
    )


async def gather(ask: Ask, size: int) -> Crowd:
    return Crowd(ask, size)


async def measure(crowd: Crowd, server: ServerProcess, *, tokens: int, burst: int) -> float:
    """CPU microseconds per reply of one burst."""
    began_s = time.process_time()
    server.tell(f"answer {burst} {tokens}")
    await crowd.replies(burst)
    cpu_us = (time.process_time() - began_s) / burst * 1e6
    await asyncio.sleep(2 * PROBE_S)  # a stall up to the last reply counts, too
    return cpu_us


def on_loop(coroutine: Any) -> Any:
    """The coroutine's result, from the loop on which every client runs."""
    return background.run(coroutine, timeout_s=TURN_TIMEOUT_S, what="a turn of the benchmark")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- The table ------------------------------------------------------------------------------------

Cell = dict[str, list[Turn]]
"""The turns of each client, one a round."""


def ratio(cell: Cell, name: str, bare: str = "bare aiohttp") -> float:
    """CPU of a client over that of a bare one, turn by turn."""
    pairs = zip(cell[name], cell[bare], strict=False)  # slow clients have but one turn
    return statistics.median(turn.cpu_us / base.cpu_us for turn, base in pairs)


def rows(cell: Cell, *, tokens: int, in_flight: int) -> Iterator[str]:
    """The lines of one cell in Markdown."""
    for name, turns in cell.items():
        yield (
            f"| {tokens:,} | {in_flight:,} | {name} "
            f"| {statistics.median(turn.cpu_us for turn in turns):,.0f} "
            f"| {ratio(cell, name):.2f} "
            f"| {max(turn.late_ms for turn in turns):.1f} "
            f"| {max(turn.stall_ms for turn in turns):.1f} "
            f"| {max(turn.gc_ms for turn in turns):.1f} "
            f"| {sum(turn.leaked_sockets for turn in turns)} |"
        )


def allow_open_files(count: int) -> None:
    """Raise the soft limit, for this process and those it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        sys.exit(
            f"{IN_FLIGHT[-1]:,} connections need {count:,} open files, but the hard limit of this "
            f"shell is {hard:,} (ulimit -Hn). Raise it, as root or in /etc/security/limits.conf."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(rounds: int) -> None:
    allow_open_files(IN_FLIGHT[-1] + 500)
    background.loop()  # has files of its own
    cells: list[Cell] = []
    print(
        "| tokens | in flight | client | CPU us/request | ratio | late ms | stall ms | gc ms "
        "| leaked |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with ServerProcess() as server:
        for tokens, in_flight in itertools.product(TOKENS, IN_FLIGHT):
            cell: Cell = {name: [] for name in CLIENTS}
            for turn, (name, client) in itertools.product(range(rounds), CLIENTS.items()):
                if turn and client.is_slow:
                    continue
                cell[name].append(take_turn(client, server, tokens=tokens, in_flight=in_flight))
            print(*rows(cell, tokens=tokens, in_flight=in_flight), sep="\n", flush=True)
            cells.append(cell)
    turns = [turn for cell in cells for name in ENGINES for turn in cell[name]]
    ratios = {
        "cpu_ratio": max(ratio(cell, "VLLMEngine") for cell in cells),
        "cpu_ratio_no_guard": max(ratio(cell, "VLLMEngine, no guard") for cell in cells),
        "cpu_ratio_same_bytes": max(
            ratio(cell, "VLLMEngine", "bare aiohttp, compact") for cell in cells
        ),
    }
    summary = {name: round(value, 2) for name, value in ratios.items()}
    summary["max_stall_ms"] = round(max(turn.stall_ms for turn in turns), 1)
    summary["leaked_sockets"] = sum(turn.leaked_sockets for turn in turns)
    print(json.dumps(summary))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(HoldingServer().run())
    else:
        main(arguments.rounds)
