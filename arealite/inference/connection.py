"""HTTP with one vLLM server: every request ends by its deadline, in bytes or in a typed error."""

import asyncio
import email.utils
import os
import time
from urllib.parse import urlsplit

import aiohttp

from arealite.errors import ServerError
from arealite.inference.tokens import CLIENT_HEADER

BODY_TIMEOUT_S = 30.0
"""From the first byte of a reply to its last: servers send a reply whole."""
CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 4.0
"""vLLM's server closes idle connections after 5 s; a longer-lived pool would race it."""
MAX_RETRY_AFTER_S = 60.0
CLIENT_ID = os.urandom(8).hex()


class RetryableError(ServerError):
    """The same request may succeed a moment later, there or elsewhere."""

    wait_s: float = 0.0
    """What the server asked for with Retry-After."""


class NoAnswerError(RetryableError):
    """The connection stands, but no answer came in time."""


class ServerBusyError(RetryableError):
    """503: it takes no requests just now."""


class NoConnectionError(RetryableError):
    """Nobody listens, or the connection broke."""


class ServerLostError(RetryableError):
    """The server was given up while it worked on this request."""


class Connection:
    """Connections to one server, made when needed and kept for a while.

    Args:
        address: `http://host:port`, or `unix:///path/of/socket`.
        token: sent with every request, if there is one; in no message and no `repr`.
        max_reply_bytes: longer replies are refused.
    """

    def __init__(self, address: str, *, token: str = "", max_reply_bytes: int = 2**28) -> None:
        self.address = address
        self._base = "http://server" if address.startswith("unix://") else address
        self._token = token
        self._max_reply_bytes = max_reply_bytes
        self._session: aiohttp.ClientSession | None = None
        self._deadlines = set[asyncio.Timeout]()
        self._lost_reason = ""

    async def post(self, path: str, body: bytes, *, limit_s: float) -> bytes:
        """The body of a reply with status 200.

        Raises:
            RetryableError: by its kind, what may pass: see above.
            ServerError: it took longer than `limit_s`, or the server refused the request.
        """
        return await self._request("POST", path, body, limit_s)

    async def get(self, path: str, *, limit_s: float) -> bytes:
        """Like `post`."""
        return await self._request("GET", path, None, limit_s)

    def give_up(self, reason: str) -> None:
        """End every request that runs, with a ServerLostError; later ones are tried as usual."""
        self._lost_reason = reason
        for deadline in list(self._deadlines):
            deadline.reschedule(asyncio.get_running_loop().time())
        self._deadlines.clear()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def _request(self, method: str, path: str, body: bytes | None, limit_s: float) -> bytes:
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                self._deadlines.add(deadline)
                return await self._exchange(method, path, body, deadline)
        except TimeoutError as error:
            if deadline not in self._deadlines:
                raise ServerLostError(f"{self.address} was given up: {self._lost_reason}") from None
            if not deadline.expired():
                raise NoConnectionError(f"{self.address} did not accept a connection.") from error
            raise NoAnswerError(
                f"{self.address}{path} did not answer within {limit_s:.0f} s."
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise NoConnectionError(
                f"No vLLM server answered at {self.address} ({type(error).__name__}). Start one "
                "with `arealite serve --model MODEL`, or leave server.addresses empty to start it."
            ) from error
        finally:
            self._deadlines.discard(deadline)

    async def _exchange(
        self, method: str, path: str, body: bytes | None, deadline: asyncio.Timeout
    ) -> bytes:
        async with self._connected().request(
            method, self._base + path, data=body, allow_redirects=False
        ) as reply:
            limit = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
            if deadline in self._deadlines and limit < (deadline.when() or limit):
                deadline.reschedule(limit)
            content = await self._read(reply)
        if reply.status != 200:
            raise _refusal(f"{self.address}{path}", reply, content)
        return content

    async def _read(self, reply: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in reply.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > self._max_reply_bytes:
                raise ServerError(
                    f"{reply.url.path} of {self.address} sent more than "
                    f"{self._max_reply_bytes:,} bytes."
                )
        return b"".join(parts)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self.address.startswith("unix://"):
                path = urlsplit(self.address).path
                connector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=KEEP_ALIVE_S)
            else:
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            headers[CLIENT_HEADER] = CLIENT_ID
            if self._token:
                headers["Authorization"] = f"Bearer {self._token}"
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
                auto_decompress=False,  # what is not plain JSON is refused as such
            )
        return self._session


def _refusal(what: str, reply: aiohttp.ClientResponse, content: bytes) -> ServerError:
    """The error that fits a status that is not 200."""
    status = reply.status
    text = f"{what} answered {status}: {content[:500].decode(errors='replace')}"
    if status == 401:
        return ServerError(
            f"{what} asks for a token. Set AREALITE_TOKEN to the one its server was started with, "
            "or server.token_file to a file that holds it."
        )
    if status not in (408, 425, 429) and status < 500:
        return ServerError(text)
    error = (ServerBusyError if status == 503 else RetryableError)(text)
    error.wait_s = _retry_after_s(reply.headers.get("Retry-After", ""))
    return error


def _retry_after_s(text: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    if text.isdigit():
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        wait_s = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
    return min(max(0.0, wait_s), MAX_RETRY_AFTER_S)
