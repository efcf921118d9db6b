"""A server that speaks vLLM's HTTP contract without a model, to be paused, hung and killed.

    client -> record, token check -> routes, in vLLM's words -> ScriptedCore
                                       └─ /health, /metrics and others answer while the core hangs

It runs on a thread of its own, on this machine only, and starts in milliseconds.
"""

import asyncio
import socket
import threading
from dataclasses import dataclass
from typing import Any, Self, cast

import msgspec
from aiohttp import web

from arealite.errors import DeadlineError
from arealite.testing.loop_thread import LoopThread, stop_accepting
from arealite.testing.scripted_core import Script, ScriptedCore, random_script
from arealite.testing.scripted_routes import Handler, Routes, errors_as_vllm, json_reply

OPEN_PATH = "/health"
KEEP_ALIVE_S = 5.0
"""After so long vLLM's HTTP server closes an idle connection."""
MAX_REQUEST_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """One request as the server got it."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)


class ScriptedServer:
    """Looks to a client like a vLLM server, and does what the test says. Use it with `with`.

    Example: a client of two servers, of which one dies.

        with ScriptedServer(tokens_per_s=500) as first, ScriptedServer() as second:
            engine = VLLMEngine([first.address, second.address])
            ...
            first.die()

    Two servers with the same seed sample the same tokens for the same prompt. `sampling_params`
    other than max_tokens, logprobs and stop_token_ids change nothing.

    Args:
        script: token ids of the response to a prompt, the end token included; endless and random
            by default. The request's budget cuts it, with the finish reason `length`.
        seed: of the default script.
        vocab_size: token ids of prompts must be below; those of the default script are.
        max_num_seqs: requests that are sampled at the same time; the others wait.
        tokens_per_s: of each single request; None samples without delay.
        token: asked for on every path but /health; empty asks for none.
        refuses_while_paused: answer 503 to new requests while paused in the modes `wait` and
            `abort`, as some versions of vLLM do; False queues them, as others do.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        seed: int = 0,
        model: str = "scripted",
        max_model_len: int = 512,
        vocab_size: int = 320,
        max_num_seqs: int = 256,
        tokens_per_s: float | None = None,
        token: str = "",
        refuses_while_paused: bool = True,
    ) -> None:
        self.received: list[Received] = []
        self._script = script or random_script(seed, vocab_size)
        self._model = model
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._tokens_per_s = tokens_per_s
        self._token = token
        self._refuses_while_paused = refuses_while_paused
        self._arrived = threading.Condition()
        self._core: ScriptedCore | None = None  # None while it is dead
        self._runner: web.AppRunner | None = None
        self._socket = _bind(0)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = LoopThread(f"scripted server {self.address}")
        self._thread.run(self._live())

    # --- What the test says -----------------------------------------------------------------------

    def hang(self) -> None:
        """Stop the engine in mid-token: connections and /health are fine, little else is."""
        self._thread.run(self._hang(True))

    def unhang(self) -> None:
        """Let the engine go on where it stopped."""
        self._thread.run(self._hang(False))

    def die(self) -> None:
        """Break all connections and refuse new ones, as after `kill -9`; the port stays ours."""
        self._thread.run(self._die())

    def restart(self) -> None:
        """Start again at the same address, with the weights of the model folder."""
        self.die()
        self._thread.run(self._live())

    def close(self) -> None:
        """End everything; may be called twice."""
        if self._socket.fileno() < 0:
            return
        self.die()
        self._socket.close()
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- What the test asks -----------------------------------------------------------------------

    @property
    def version(self) -> str:
        """Of its weights: `default` until it is told one, empty while it is dead."""
        return "" if self._core is None else self._core.version

    def bodies(self, path: str) -> list[bytes]:
        """What requests for this path have sent, over all lives of the server."""
        with self._arrived:
            return [received.body for received in self.received if received.path == path]

    def count(self, path: str) -> int:
        """How many requests for this path have come."""
        return len(self.bodies(path))

    def wait_for(self, path: str, count: int = 1, *, timeout_s: float = 10.0) -> None:
        """Return when so many requests for this path have come.

        Raises:
            DeadlineError: they did not.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: self.count(path) >= count, timeout_s):
                raise DeadlineError(
                    f"{self.count(path)} of {count} requests for {path} came to {self.address} "
                    f"within {timeout_s:g} s. Does the client still wait for something?"
                )

    # --- Its life, on its own thread --------------------------------------------------------------

    async def _live(self) -> None:
        core = ScriptedCore(
            self._script,
            max_num_seqs=self._max_num_seqs,
            tokens_per_s=self._tokens_per_s,
            refuses_while_paused=self._refuses_while_paused,
        )
        routes = Routes(
            core,
            model=self._model,
            max_model_len=self._max_model_len,
            vocab_size=self._vocab_size,
        )
        app = web.Application(
            middlewares=[self._receive, errors_as_vllm], client_max_size=MAX_REQUEST_BYTES
        )
        app.add_routes(routes.table())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a client that leaves aborts its request
            keepalive_timeout=KEEP_ALIVE_S,
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()
        self._core = core

    async def _die(self) -> None:
        if self._runner is None:
            return
        await stop_accepting([self._socket])
        for site in list(self._runner.sites):
            await site.stop()
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                cast(asyncio.WriteTransport, connection.transport).abort()
        await self._runner.cleanup()
        self._runner = self._core = None
        # Bound, but not listening: connections are refused, and nobody else gets the port.
        self._socket = _bind(int(self.address.rpartition(":")[2]))

    async def _hang(self, is_hung: bool) -> None:
        assert self._core is not None, "a dead server cannot hang: restart() it first"
        self._core.hang(is_hung)

    @web.middleware
    async def _receive(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note the request, and ask for the token."""
        received = Received(
            method=request.method,
            path=request.path,
            query=dict(request.query),
            body=await request.read(),
        )
        with self._arrived:
            self.received.append(received)
            self._arrived.notify_all()
        is_known = request.headers.get("Authorization") == f"Bearer {self._token}"
        if self._token and not is_known and request.path != OPEN_PATH:
            return json_reply({"error": "This server asks for a token."}, status=401)
        return await handler(request)


def _bind(port: int) -> socket.socket:
    """A socket that owns the port, but does not listen; 0 is any free one."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
