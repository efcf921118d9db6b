"""What a `FaultProxy` can do to an exchange. Each fault is a frozen value with one idea.

    answers instead of the server      Status, Redirect, Raw, Blackhole, Reset
    the server's reply, badly sent     Delay, SlowBody, CutBody, CloseIdle, Duplicate, Oversized
    the server's reply, with an edit   SetHeader, ReplaceBody, Prepend, SetValue, DeleteValue,
                                       RepeatValue

`BAD_GENERATE_REPLIES` names all ways in which a reply of /inference/v1/generate can be HTTP and
JSON without a flaw, and yet nothing that a client may train on.
"""

import asyncio
import email.utils
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from arealite.errors import ConfigError
from arealite.testing.fault_proxy import Exchange, Fault, Reply

CHUNK_BYTES = 2**16


# --- Instead of the server ------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """An answer with this status, of which the server knows nothing.

    Args:
        retry_after_s: adds Retry-After; a date has no fractions of a second, and is rounded up.
        is_date: whether Retry-After is a date instead of a number.
    """

    status: int
    retry_after_s: float | None = None
    is_date: bool = False

    async def apply(self, exchange: Exchange) -> None:
        reply = Reply(status=self.status)
        if self.status != HTTPStatus.NO_CONTENT:
            error = {"message": "injected", "type": "Injected", "param": None, "code": self.status}
            reply = replace(reply, body=json.dumps({"error": error}).encode())
        if self.retry_after_s is not None:
            reply = reply.with_header("Retry-After", self._retry_after(self.retry_after_s))
        await exchange.send(reply)

    def _retry_after(self, seconds: float) -> str:
        if self.is_date:
            return email.utils.formatdate(math.ceil(time.time() + seconds), usegmt=True)
        return f"{seconds:g}"


@dataclass(frozen=True)
class Redirect:
    """307 to another address."""

    location: str

    async def apply(self, exchange: Exchange) -> None:
        await exchange.send(Reply(status=307).with_header("Location", self.location))


@dataclass(frozen=True)
class Raw:
    """Exactly these bytes on the wire, and the end of the connection."""

    content: bytes

    async def apply(self, exchange: Exchange) -> None:
        await exchange.send(self.content)
        exchange.close()


@dataclass(frozen=True)
class Blackhole:
    """Never an answer, on a connection that stays open.

    Args:
        is_forwarded: whether the server does the work all the same.
    """

    is_forwarded: bool = False

    async def apply(self, exchange: Exchange) -> None:
        if self.is_forwarded:
            await exchange.forward()
        await asyncio.Event().wait()


@dataclass(frozen=True)
class Reset:
    """A TCP reset instead of an answer.

    Args:
        is_forwarded: whether the server has done the work by then.
    """

    is_forwarded: bool = False

    async def apply(self, exchange: Exchange) -> None:
        if self.is_forwarded:
            await exchange.forward()
        exchange.reset()


# --- The server's reply, badly sent ---------------------------------------------------------------


@dataclass(frozen=True)
class Delay:
    """The server's reply, so many seconds after it was there."""

    seconds: float

    async def apply(self, exchange: Exchange) -> None:
        reply = await exchange.forward()
        await asyncio.sleep(self.seconds)
        await exchange.send(reply)


@dataclass(frozen=True)
class SlowBody:
    """The head at once, then the body byte by byte."""

    bytes_per_s: float = 1.0

    async def apply(self, exchange: Exchange) -> None:
        reply = await exchange.forward()
        exchange.status = reply.status
        await exchange.send(reply.head())
        for byte in reply.body:
            await asyncio.sleep(1 / self.bytes_per_s)
            await exchange.send(bytes([byte]))


@dataclass(frozen=True)
class CutBody:
    """Only the first bytes of the body.

    Args:
        is_announced: Content-Length says how many come, so that the reply is proper HTTP; else it
            tells of the whole body, and the connection ends before that.
    """

    num_bytes: int
    is_announced: bool = True

    async def apply(self, exchange: Exchange) -> None:
        reply = await exchange.forward()
        cut = replace(reply, body=reply.body[: self.num_bytes])
        if self.is_announced:
            await exchange.send(cut)
            return
        await exchange.send(cut.with_header("Content-Length", str(len(reply.body))))
        exchange.close()


@dataclass(frozen=True)
class CloseIdle:
    """The server's reply, and some time later the end of the connection, without a word of it."""

    after_s: float = 0.0

    async def apply(self, exchange: Exchange) -> None:
        await exchange.send(await exchange.forward())
        exchange.close_later(self.after_s)


@dataclass(frozen=True)
class Duplicate:
    """The server's reply twice: a second answer that nobody asked for waits on the connection.

    Args:
        after_s: how much later the second one is sent, such as when the client has turned to other
            work and left its connection idle.
    """

    after_s: float = 0.0

    async def apply(self, exchange: Exchange) -> None:
        reply = await exchange.forward()
        await exchange.send(reply)
        await asyncio.sleep(self.after_s)
        await exchange.send(reply)


@dataclass(frozen=True)
class Oversized:
    """The server's reply after so many spaces, in chunks: right in all but its size."""

    num_bytes: int

    async def apply(self, exchange: Exchange) -> None:
        reply = await exchange.forward()
        exchange.status = reply.status
        await exchange.send(reply.with_header("Transfer-Encoding", "chunked").head())
        for start in range(0, self.num_bytes, CHUNK_BYTES):
            await exchange.send(_chunk(b" " * min(CHUNK_BYTES, self.num_bytes - start)))
        await exchange.send(_chunk(reply.body) + _chunk(b""))


# --- The server's reply, with an edit -------------------------------------------------------------


@dataclass(frozen=True)
class SetHeader:
    """The server's reply with another header, be it true or not.

    A Content-Length that is too large leaves the client waiting; one that is too small leaves
    bytes on the connection.
    """

    name: str
    value: str

    async def apply(self, exchange: Exchange) -> None:
        await exchange.send((await exchange.forward()).with_header(self.name, self.value))


@dataclass(frozen=True)
class ReplaceBody:
    """200 with another body."""

    body: bytes
    content_type: str = "application/json"

    async def apply(self, exchange: Exchange) -> None:
        reply = replace(await exchange.forward(), status=200, body=self.body)
        await exchange.send(reply.with_header("Content-Type", self.content_type))


@dataclass(frozen=True)
class Prepend:
    """The server's reply with bytes before its body, such as a byte-order mark."""

    content: bytes

    async def apply(self, exchange: Exchange) -> None:
        reply = await exchange.forward()
        await exchange.send(replace(reply, body=self.content + reply.body))


@dataclass(frozen=True)
class SetValue:
    """The server's JSON with another value at a place such as `choices/0/token_ids/3`."""

    place: str
    value: Any

    async def apply(self, exchange: Exchange) -> None:
        def edit(parent: Any, key: Any) -> None:
            parent[key] = self.value

        await _send_edited(exchange, self.place, edit)


@dataclass(frozen=True)
class DeleteValue:
    """The server's JSON without what is at this place."""

    place: str

    async def apply(self, exchange: Exchange) -> None:
        def edit(parent: Any, key: Any) -> None:
            del parent[key]

        await _send_edited(exchange, self.place, edit)


@dataclass(frozen=True)
class RepeatValue:
    """The server's JSON with one element of a list twice."""

    place: str

    async def apply(self, exchange: Exchange) -> None:
        def edit(parent: Any, key: Any) -> None:
            parent.insert(key, parent[key])

        await _send_edited(exchange, self.place, edit)


async def _send_edited(exchange: Exchange, place: str, edit: Callable[[Any, Any], None]) -> None:
    """The server's reply after `edit(parent, key)` on its JSON; NaN is written as `NaN`."""
    reply = await exchange.forward()
    content = json.loads(reply.body)
    *parents, key = [int(part) if part.isdigit() else part for part in place.split("/")]
    parent = content
    try:
        for step in parents:
            parent = parent[step]
        edit(parent, key)
    except (LookupError, TypeError) as error:
        raise ConfigError(
            f"There is no {place!r} in the reply {reply.body[:200]!r}. A place is written with "
            "slashes, such as choices/0/finish_reason."
        ) from error
    await exchange.send(replace(reply, body=json.dumps(content).encode()))


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


# --- Named ----------------------------------------------------------------------------------------

HTML_PAGE = ReplaceBody(b"<!DOCTYPE html><html><body>Bad gateway</body></html>", "text/html")
BYTE_ORDER_MARK = Prepend(b"\xef\xbb\xbf")
GZIP_LIE = SetHeader("Content-Encoding", "gzip")
BAD_CHUNK = Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n{}\r\n0\r\n\r\n")

_CHOICE = "choices/0"
_TOKEN = f"{_CHOICE}/token_ids/0"
_ENTRY = f"{_CHOICE}/logprobs/content/0"
_SPANS = f"{_CHOICE}/weight_versions"

BAD_GENERATE_REPLIES: dict[str, Fault] = {
    "fewer log-probs than tokens": DeleteValue(_ENTRY),
    "more log-probs than tokens": RepeatValue(_ENTRY),
    "no log-probs": SetValue(f"{_CHOICE}/logprobs", None),
    "log-prob is nan": SetValue(f"{_ENTRY}/logprob", math.nan),
    "log-prob is infinite": SetValue(f"{_ENTRY}/logprob", -math.inf),
    "log-prob is null": SetValue(f"{_ENTRY}/logprob", None),
    "log-prob is -9999": SetValue(f"{_ENTRY}/logprob", -9999.0),
    "log-prob is positive": SetValue(f"{_ENTRY}/logprob", 0.5),
    "token id beyond any vocabulary": SetValue(_TOKEN, 2**31),
    "token id beyond 63 bits": SetValue(_TOKEN, 2**63),
    "token id is negative": SetValue(_TOKEN, -1),
    "token id is not whole": SetValue(_TOKEN, 1.5),
    "spans are null": SetValue(_SPANS, None),
    "spans are missing": DeleteValue(_SPANS),
    "spans have a gap": SetValue(f"{_SPANS}/0/start", 1),
    "spans overlap": RepeatValue(f"{_SPANS}/0"),
    "spans end too early": SetValue(f"{_SPANS}/0/end", 0),
    "span of a future version": SetValue(f"{_SPANS}/0/version", "1000000"),
    "span of a version that is no number": SetValue(f"{_SPANS}/0/version", "seven"),
    "unknown finish reason": SetValue(f"{_CHOICE}/finish_reason", "tired"),
    "no finish reason": SetValue(f"{_CHOICE}/finish_reason", None),
    "no choices": SetValue("choices", []),
    "two choices": RepeatValue(_CHOICE),
}
"""By name; for a reply of at least two tokens."""
