"""What arealite adds to the HTTP side of a vLLM server, through its `--middleware` option.

A token on every path (vLLM's own `--api-key` leaves /pause, /collective_rpc and others open), an
end to pauses whose trainer has died, /arealite/model, and replies in a tenth of their bytes. Pure
ASGI: no framework is needed.
"""

import asyncio
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from arealite.inference.reply_formats import COMPACT, compact
from arealite.inference.tokens import CLIENT_HEADER, TOKEN
from arealite.inference.transport import WEIGHTS_DIR

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

OPEN_PATH = "/health"
GENERATE = "/inference/v1/generate"
LEASE_S = 20.0
"""A pause ends when the client that asked for it has not been heard of for so long."""
SLEEP_LEASE_S = 120.0
"""The same for one that has put the server to sleep, to train meanwhile."""
UNFINISHED = "unfinished-update"
"""Weight version of a server whose update lost its trainer: no client takes it for a push."""


class Guard:
    """ASGI middleware, made by vLLM once per server."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._token = os.environ.get(TOKEN, "")
        self._pauser = b""  # the client that paused the server, or updates it
        self._heard_s = 0.0
        self._is_update_open = False
        self._is_asleep = False
        self._lease: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if not self._is_allowed(scope["path"], headers.get(b"authorization", b"")):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await _answer(send, 401, {"error": "This server asks for a token."})
        if scope["path"] == "/arealite/model":
            return await _answer(send, 200, _describe_model(scope["app"]))
        self._follow(scope, headers.get(CLIENT_HEADER.lower().encode(), b""))
        if scope["path"] == GENERATE and COMPACT.encode() in headers.get(b"accept", b""):
            send = _CompactSend(send)
        await self._app(scope, receive, self._noting_the_end(scope, send))

    def _is_allowed(self, path: str, authorization: bytes) -> bool:
        if not self._token or path == OPEN_PATH:
            return True
        return hmac.compare_digest(authorization, f"Bearer {self._token}".encode())

    def _follow(self, scope: Scope, client: bytes) -> None:
        """Keep track of who holds the server paused, and begin to watch for its end."""
        if client and client == self._pauser:
            self._heard_s = time.monotonic()
        match scope["method"], scope["path"]:
            case "POST", "/pause" | "/sleep" if client:
                self._pauser, self._heard_s = client, time.monotonic()
                self._is_asleep = self._is_asleep or scope["path"] == "/sleep"
                if self._lease is None or self._lease.done():
                    self._lease = asyncio.create_task(self._watch(dict(scope)))
            case "POST", "/wake_up":
                self._is_asleep = bool(scope["query_string"])  # with tags, some of it sleeps on
            case "POST", "/start_weight_update":
                self._is_update_open = True
            case "POST", "/resume":
                self._pauser = b""

    def _noting_the_end(self, scope: Scope, send: Any) -> Any:
        """`send`, which also notes that an update has ended; one that failed to end is open."""
        if scope["path"] != "/finish_weight_update":
            return send

        async def note(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self._is_update_open = False
            await send(message)

        return note

    async def _watch(self, scope: Scope) -> None:
        """Undo what a dead client has left: its update first, then the pause."""
        while self._pauser:
            silence_s = time.monotonic() - self._heard_s
            lease_s = SLEEP_LEASE_S if self._is_asleep else LEASE_S
            if silence_s < lease_s:
                await asyncio.sleep(min(LEASE_S, lease_s - silence_s))
                continue
            print(f"The client that paused this server is gone for {silence_s:.0f} s.", flush=True)
            if self._is_update_open:
                await self._post(scope, "/update_weights", {"update_info": {"is_abandoned": True}})
                await self._post(scope, "/update_weight_version", {"new_version": UNFINISHED})
                self._is_update_open = False
            if self._is_asleep:
                await self._post(scope, "/wake_up", {})
                self._is_asleep = False
            await self._post(scope, "/resume", {})
            self._pauser = b""

    async def _post(self, scope: Scope, path: str, body: dict[str, Any]) -> None:
        """Ask the server itself, as the client whose request `scope` was."""
        content = json.dumps(body).encode()
        headers = [
            (name, value) for name, value in scope["headers"] if name == b"authorization"
        ] + [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        request = {**scope, "method": "POST", "path": path, "raw_path": path.encode()}
        request |= {"query_string": b"", "headers": headers}

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None: ...

        try:
            await self._app(request, receive, send)
        except Exception as error:  # an update that is abandoned fails by design
            print(f"{path}: {error}", flush=True)


class _CompactSend:
    """A `send` that passes a reply on in fewer bytes; one that is not of tokens as it is."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._start: Any = None  # of the reply, until its end is there
        self._body = b""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start" and _is_json_reply(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_all()

    async def _send_all(self) -> None:
        body = compact(self._body)
        if body is not None:
            headers = [
                pair
                for pair in self._start["headers"]
                if pair[0] not in (b"content-type", b"content-length")
            ]
            headers += [(b"content-type", COMPACT.encode()), (b"content-length", b"%d" % len(body))]
            self._start = {**self._start, "headers": headers}
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body or self._body})


def _is_json_reply(start: Any) -> bool:
    return start["status"] == 200 and (b"content-type", b"application/json") in start["headers"]


def _describe_model(app: Any) -> dict[str, Any]:
    """What a client checks its requests and settings against."""
    config = app.state.vllm_config
    return {
        "weights_dir": os.environ.get(WEIGHTS_DIR, ""),
        "vocab_size": config.model_config.get_vocab_size(),
        "max_num_seqs": config.scheduler_config.max_num_seqs
        * config.parallel_config.data_parallel_size,
        "num_workers": config.parallel_config.world_size
        * config.parallel_config.data_parallel_size,
    }


async def _answer(send: Any, status: int, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
