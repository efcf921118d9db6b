"""A proxy in front of any HTTP server that breaks the exchanges it is told to break.

    client -> FaultProxy -> upstream
                 └─ inject(Status(500), on=range(3), path="/inference/v1/generate")

It writes to the socket itself, so that also what no server would send can be sent. The faults are
in `arealite.testing.faults`; a class of yours with `apply` is one, too.
"""

import asyncio
import http.client
import socket
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Protocol, Self
from urllib.parse import urlsplit

import aiohttp

from arealite.testing.loop_thread import LoopThread, stop_accepting

MAX_HEAD_BYTES = 2**20
OF_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "upgrade", "host"}
"""Headers that a proxy does not pass on: it writes its own."""
ACCEPT = "accept"
"""Not passed on either: a server then answers in JSON, which faults can read and change."""
# The session adds these to what the client sent, if it may.
ADDED_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a client asked for."""

    method: str
    target: str  # path and query
    headers: Headers
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the server answered, or what it shall have answered."""

    status: int
    headers: Headers = (("Content-Type", "application/json"),)
    body: bytes = b""

    def with_header(self, name: str, value: str) -> "Reply":
        """The same reply, with this header and no other of its name."""
        kept = tuple(pair for pair in self.headers if pair[0].lower() != name.lower())
        return replace(self, headers=(*kept, (name, value)))

    def head(self) -> bytes:
        """Status line and headers; the true Content-Length unless the headers have another."""
        headers = list(self.headers)
        names = {name.lower() for name, _ in headers}
        is_sized = bool(names & {"content-length", "transfer-encoding"})
        if not is_sized and self.status != http.client.NO_CONTENT:
            headers.append(("Content-Length", str(len(self.body))))
        lines = [f"HTTP/1.1 {self.status} {http.client.responses.get(self.status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def to_bytes(self) -> bytes:
        return self.head() + self.body


class Fault(Protocol):
    """What becomes of one exchange; a frozen value, so that tests can compare it."""

    async def apply(self, exchange: "Exchange") -> None:
        """Send what the fault has to send; after it the connection is open unless closed here."""
        ...


@dataclass(eq=False, slots=True)
class Exchange:
    """One request and what was done with it: what a fault works on, and what the proxy records."""

    request: Request
    fault: Fault | None = None
    status: int | None = None  # of the reply; None while there is none
    num_bytes_sent: int = 0
    is_forwarded: bool = False  # whether the server saw the request
    is_reset: bool = False
    _proxy: "FaultProxy" = field(kw_only=True, repr=False)
    _writer: asyncio.StreamWriter = field(kw_only=True, repr=False)

    async def forward(self) -> Reply:
        """The server's reply."""
        self.is_forwarded = True
        return await self._proxy.ask_upstream(self.request)

    async def send(self, reply: Reply | bytes) -> None:
        """Write a whole reply, or any bytes."""
        if isinstance(reply, Reply):
            self.status = reply.status
            reply = reply.to_bytes()
        self.num_bytes_sent += len(reply)
        self._writer.write(reply)
        await self._writer.drain()

    def close(self) -> None:
        """End the connection in the ordinary way, after what was sent."""
        self._writer.close()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.is_reset = True
        if not self._writer.transport.is_closing():
            linger_0_s = struct.pack("ii", 1, 0)
            bare: socket.socket = self._writer.get_extra_info("socket")
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_0_s)
        self._writer.transport.abort()

    def close_later(self, after_s: float) -> None:
        """End the connection when so much time has passed, whatever is on it then."""
        asyncio.get_running_loop().call_later(after_s, self._writer.close)


@dataclass(eq=False, slots=True)
class _Injection:
    fault: Fault
    on: Collection[int] | None
    path: str | None
    when: Callable[[Request], bool] | None
    num_seen: int = 0

    def takes(self, request: Request) -> bool:
        """Whether this request is one of those the fault was injected for; counts it."""
        if self.path is not None and request.path != self.path:
            return False
        if self.when is not None and not self.when(request):
            return False
        index, self.num_seen = self.num_seen, self.num_seen + 1
        return self.on is None or index in self.on


class FaultProxy:
    """Passes requests on to a server, and faults back to its clients. Use it with `with`.

    Example: the first reply is cut, its retry is not.

        with ScriptedServer() as server, FaultProxy(server.address) as proxy:
            proxy.inject(faults.CutBody(100), on=[0], path="/inference/v1/generate")
            with VLLMEngine([proxy.address]) as engine:
                ...
            assert [exchange.fault for exchange in proxy.exchanges_of("/inference/v1/generate")]

    Replies are passed on whole, not as a stream. Where the server refuses a connection or breaks
    it, the client's connection is reset. A client that leaves is followed by its request.
    """

    def __init__(self, upstream: str) -> None:
        self.exchanges: list[Exchange] = []
        self._upstream = upstream.rstrip("/")
        self._injections: list[_Injection] = []
        self._tasks = set[asyncio.Task[None]]()
        self._failures: list[Exception] = []  # errors of faults and predicates, not of servers
        self._thread: LoopThread | None = LoopThread(f"fault proxy of {upstream}")
        self.address = self._thread.run(self._open())

    def inject(
        self,
        fault: Fault,
        *,
        on: Collection[int] | None = None,
        path: str | None = None,
        when: Callable[[Request], bool] | None = None,
    ) -> None:
        """Break some of the requests that come from now on; of two faults the first injected wins.

        Args:
            on: which of the requests that fit, counted from 0; None breaks all of them.
            path: only requests for exactly this path fit.
            when: only requests for which this is true fit.

        Raises:
            TypeError: at once, for what is no fault or no collection of numbers.
        """
        if not hasattr(fault, "apply"):
            raise TypeError(f"inject got {fault!r:.80}, which is no fault: see testing.faults.")
        if on is not None and not isinstance(on, Collection):
            raise TypeError(f"inject got on={on!r}: write on=[{on!r}].")
        self._injections.append(_Injection(fault, on, path, when))

    def stop_listening(self) -> None:
        """Refuse new connections, as a server that ends; those that are open stay."""
        assert self._thread is not None
        self._thread.run(self._stop_listening())

    def listen_again(self) -> None:
        """At the same address."""
        assert self._thread is not None
        self._thread.run(self._listen(urlsplit(self.address).port or 0))

    def clear(self) -> None:
        """Break nothing more."""
        self._injections.clear()

    def exchanges_of(self, path: str) -> list[Exchange]:
        """What was done with the requests for this path, in the order in which they came."""
        return [exchange for exchange in self.exchanges if exchange.request.path == path]

    def close(self) -> None:
        """End all connections; may be called twice.

        Raises:
            Exception: what a fault or a predicate of an injection raised, such as a KeyError for
                a place that a reply has not.
        """
        if self._thread is not None:
            self._thread.run(self._shut())
            self._thread.close()
            self._thread = None
        if self._failures:
            raise self._failures.pop(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- On its own thread ------------------------------------------------------------------------

    async def ask_upstream(self, request: Request) -> Reply:
        """The server's reply to this request."""
        async with self._session.request(
            request.method,
            self._upstream + request.target,
            headers=_end_to_end(request.headers),
            data=request.body,
            allow_redirects=False,
        ) as reply:
            headers = _end_to_end(tuple(reply.headers.items()))
            return Reply(status=reply.status, headers=headers, body=await reply.read())

    async def _open(self) -> str:
        self._session = aiohttp.ClientSession(
            # A connection for each request: what breaks is broken by a fault, not by a pool.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            skip_auto_headers=ADDED_HEADERS,
            auto_decompress=False,
        )
        return f"http://127.0.0.1:{await self._listen(0)}"

    async def _listen(self, port: int) -> int:
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", port, limit=MAX_HEAD_BYTES
        )
        return self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        await stop_accepting(self._server.sockets)
        self._server.close()

    async def _shut(self) -> None:
        await self._stop_listening()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()
        await asyncio.sleep(0)  # lets the loop close the sockets

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            writer.transport.abort()

        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read requests until the client leaves; then also stop answering."""
        requests = asyncio.Queue[Request]()
        answering = asyncio.create_task(self._answer_each(requests, writer))
        try:
            while (request := await _read_request(reader)) is not None:
                requests.put_nowait(request)
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _answer_each(
        self, requests: asyncio.Queue[Request], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            exchange = Exchange(await requests.get(), _proxy=self, _writer=writer)
            self.exchanges.append(exchange)
            try:
                exchange.fault = self._fault_for(exchange.request)
                if exchange.fault is None:
                    await exchange.send(await exchange.forward())
                else:
                    await exchange.fault.apply(exchange)
            except (aiohttp.ClientError, OSError):
                exchange.reset()  # the server broke the connection, or the client did
            except Exception as error:
                self._failures.append(error)
                if exchange.num_bytes_sent:
                    exchange.reset()
                else:  # not a reset, which would look like a fault of the network
                    text = f"The fault itself failed: {type(error).__name__}: {error}"
                    await exchange.send(Reply(status=400, body=text.encode()))

    def _fault_for(self, request: Request) -> Fault | None:
        takers = [injection for injection in self._injections if injection.takes(request)]
        return takers[0].fault if takers else None


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a connection; None when there will be no more."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = [line.partition(":") for line in lines]
        headers = tuple((name, value.strip()) for name, _, value in pairs)
        by_name = {name.lower(): value for name, value in headers}
        if "transfer-encoding" in by_name:
            body = await _read_chunks(reader)
        else:
            body = await reader.readexactly(int(by_name.get("content-length", 0)))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, OSError):
        return None
    return Request(method=method, target=target, headers=headers, body=body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return body


def _end_to_end(headers: Headers) -> Headers:
    return tuple(pair for pair in headers if pair[0].lower() not in {*OF_ONE_HOP, ACCEPT})
