"""HTTP with one vLLM server: every request ends by its deadline, in bytes or in a typed error."""

import asyncio
import email.utils
import errno
import os
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from arealite.errors import ServerError
from arealite.inference.reply_formats import COMPACT
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


class RefusedError(NoConnectionError):
    """Nobody listens: the server has ended, or is about to."""


class TooManyFilesError(RetryableError):
    """This process has no file descriptor left."""


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
        self._sessions: dict[bool, aiohttp.ClientSession] = {}  # by whether connections are kept
        self._deadlines: dict[asyncio.Timeout, bool] = {}  # and whether a response is sampled
        self._left_s: dict[asyncio.Timeout, float] = {}  # of deadlines whose clock stands still
        self._has_stopped = False
        self._lost_reason = ""
        self._is_closed = False

    async def post(
        self,
        path: str,
        body: bytes,
        *,
        limit_s: float,
        echo: bytes = b"",
        may_reuse: bool = False,
    ) -> bytes:
        """The body of a reply with status 200.

        Args:
            echo: the id that a reply repeats if it names its request at all. A reply that came
                twice would otherwise be taken for that of the next request on its connection.
            may_reuse: take a connection that has served other requests.

        Raises:
            RetryableError: by its kind, what may pass: see above.
            ServerError: it took longer than `limit_s`, or the server refused the request.
        """
        return await self._request("POST", path, body, limit_s, echo, may_reuse)

    async def get(self, path: str, *, limit_s: float) -> bytes:
        """Like `post`."""
        return await self._request("GET", path, None, limit_s, b"", False)

    def give_up(self, reason: str) -> None:
        """End every request that runs, with a ServerLostError; later ones are tried as usual."""
        self._lost_reason = reason
        for deadline in self._deadlines:
            if not deadline.expired():  # in this turn of the loop, maybe
                deadline.reschedule(asyncio.get_running_loop().time())
        self._deadlines.clear()
        self._left_s.clear()

    def stop_clocks(self) -> None:
        """The server samples nothing: no time passes for responses until `start_clocks`."""
        self._has_stopped = True
        for deadline, is_sampling in self._deadlines.items():
            if is_sampling:
                self._stop(deadline)

    def start_clocks(self) -> None:
        """Requests have as much time as they had left."""
        self._has_stopped = False
        now_s = asyncio.get_running_loop().time()
        for deadline, left_s in self._left_s.items():
            deadline.reschedule(now_s + left_s)
        self._left_s.clear()

    def _stop(self, deadline: asyncio.Timeout) -> None:
        when_s = deadline.when()
        if when_s is not None and not deadline.expired():
            self._left_s[deadline] = when_s - asyncio.get_running_loop().time()
            deadline.reschedule(None)

    async def close(self) -> None:
        """End every request that runs, and refuse later ones."""
        self._is_closed = True
        self.give_up("the connection was closed")
        for session in self._sessions.values():
            await session.close()
        self._sessions = {}

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        limit_s: float,
        echo: bytes,
        may_reuse: bool,
    ) -> bytes:
        if self._is_closed:
            raise ServerLostError(f"The connection to {self.address} was closed.")
        deadline = asyncio.timeout(limit_s)
        try:
            async with deadline:
                self._deadlines[deadline] = bool(echo)
                if self._has_stopped and echo:
                    self._stop(deadline)
                session = self._session(is_kept=may_reuse)
                return await self._exchange(session, method, path, body, echo, deadline)
        except TimeoutError as error:
            if deadline not in self._deadlines:
                raise ServerLostError(f"{self.address} was given up: {self._lost_reason}") from None
            if not deadline.expired():
                raise NoConnectionError(f"{self.address} did not accept a connection.") from error
            raise NoAnswerError(
                f"{self.address}{path} did not answer within {limit_s:.0f} s."
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise TooManyFilesError(
                    f"Too many open files for a connection to {self.address}. Raise the limit with "
                    "`ulimit -n`, or lower rollout.max_running_prompts."
                ) from error
            is_refused = isinstance(error, aiohttp.ClientConnectorError)
            raise (RefusedError if is_refused else NoConnectionError)(
                f"No vLLM server answered at {self.address} ({type(error).__name__}). Start one "
                "with `arealite serve --model MODEL`, or leave server.addresses empty to start it."
            ) from error
        finally:
            self._deadlines.pop(deadline, None)
            self._left_s.pop(deadline, None)

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: bytes | None,
        echo: bytes,
        deadline: asyncio.Timeout,
    ) -> bytes:
        url = self._base + path
        async with session.request(method, url, data=body, allow_redirects=False) as reply:
            limit = asyncio.get_running_loop().time() + BODY_TIMEOUT_S
            if deadline in self._deadlines and limit < (deadline.when() or limit):
                deadline.reschedule(limit)
            content = await self._read(reply)
            if reply.status == 200 and b"request_id" in content and echo not in content:
                reply.close()  # with what else may wait on this connection
                raise RetryableError(f"{self.address}{path} answered another request.")
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
                    f"{self._max_reply_bytes:,} bytes. Raise server.max_reply_bytes, or lower "
                    "sampling.max_new_tokens."
                )
        return b"".join(parts)

    def _session(self, *, is_kept: bool) -> aiohttp.ClientSession:
        if is_kept not in self._sessions:
            self._sessions[is_kept] = self._make_session(is_kept)
        return self._sessions[is_kept]

    def _make_session(self, is_kept: bool) -> aiohttp.ClientSession:
        options: dict[str, Any] = {"limit": 0, "force_close": not is_kept}
        if is_kept:
            options["keepalive_timeout"] = KEEP_ALIVE_S
        if self.address.startswith("unix://"):
            connector = aiohttp.UnixConnector(urlsplit(self.address).path, **options)
        else:
            connector = aiohttp.TCPConnector(**options)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Accept": f"{COMPACT}, application/json", CLIENT_HEADER: CLIENT_ID}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,  # what was compressed is refused as such
        )


def _refusal(what: str, reply: aiohttp.ClientResponse, content: bytes) -> ServerError:
    """The error that fits a status that is not 200."""
    status = reply.status
    text = f"{what} answered {status}: {content[:500].decode(errors='replace')}"
    if status == 401 and "Authorization" in reply.request_info.headers:
        return ServerError(
            f"{what} refuses the token of this run. Set AREALITE_TOKEN, or the file that "
            "server.token_file names, to the one its server was started with."
        )
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
