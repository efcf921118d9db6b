"""The HTTP side: `/v1/chat/completions` of each episode at an address and with a key of its own.

    http://127.0.0.1:PORT/episodes/ID/v1/chat/completions    answers, streamed or whole
                                     /models                 one, under any name
                                     /reward                 {"reward": 1.0, "completion_id": ...}

A call without the key of a running episode is answered 401, whatever it asks for.
"""

import asyncio
import atexit
import contextlib
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self

import msgspec
from aiohttp import web

from arealite import background
from arealite.agents.episode import Episode
from arealite.agents.replies import Completion, chunks, refusal, whole
from arealite.agents.requests import RequestError, read_call
from arealite.errors import ConfigError

MAX_BODY_BYTES = 64 * 2**20
START_TIMEOUT_S = 30

Handler = Callable[[web.Request, Episode], Awaitable[web.StreamResponse]]


class Endpoint:
    """Serves the episodes of this process to OpenAI clients. Use it with `with`, or close it.

    Args:
        host: address to listen at; agents on other hosts need one that they reach. 0.0.0.0 listens
            at all of them, and goes by the name of this host.
        port: 0 takes a free one.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._episodes: dict[str, Episode] = {}
        self._runner: web.AppRunner | None = None
        try:
            self.address = background.run(
                self._listen(host, port), timeout_s=START_TIMEOUT_S, what="starting the endpoint"
            )
        except OSError as error:
            raise ConfigError(f"No endpoint for agents at {host}:{port}: {error}.") from error

    @contextlib.asynccontextmanager
    async def serve(self, episode: Episode) -> AsyncIterator[Episode]:
        """Let calls reach this episode while the context lasts; then give up those that run."""
        name = secrets.token_hex(8)
        episode.base_url = f"{self.address}/episodes/{name}/v1"
        self._episodes[name] = episode
        try:
            yield episode
        finally:
            del self._episodes[name]
            ended = background.submit(_end(episode))  # on the loop of its calls
            await asyncio.shield(asyncio.wrap_future(ended))

    def close(self) -> None:
        """Stop listening; calls that still run end."""
        runner, self._runner = self._runner, None
        if runner is not None:
            background.run(runner.cleanup(), timeout_s=START_TIMEOUT_S, what="closing the endpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _listen(self, host: str, port: int) -> str:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        routes = {
            ("POST", "/chat/completions"): self._complete,
            ("GET", "/models"): self._models,
            ("GET", "/models/{model:.+}"): self._model,
            ("POST", "/reward"): self._reward,
            ("*", "/{path:.*}"): _no_such_path,
        }
        for (method, path), handler in routes.items():
            app.router.add_route(method, f"/episodes/{{name}}/v1{path}", self._authorized(handler))
        for path in ("/episodes/{name}/{path:.*}", "/{path:.*}"):
            app.router.add_route("*", path, self._authorized(_no_such_path))
        # A client that goes away ends its request, and so what is sampled for it.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=1.0, access_log=None
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        return f"http://{_of_url(host)}:{self._runner.addresses[0][1]}"

    def _authorized(
        self, handler: Handler
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                return await handler(request, self._episode_of(request))
            except RequestError as error:
                # Engines ask again what is worth asking again; a client would only take longer.
                headers = {"x-should-retry": "false"}
                return _json(refusal(error), status=error.status, headers=headers)

        return answer

    def _episode_of(self, request: web.Request) -> Episode:
        """The running episode whose address and key these are."""
        episode = self._episodes.get(request.match_info.get("name", ""))
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        known = episode.api_key if episode is not None else secrets.token_hex()
        if scheme.lower() != "bearer" or not secrets.compare_digest(key.encode(), known.encode()):
            raise RequestError(
                "This address needs the key of its episode, while the episode runs.",
                status=401,
                code="invalid_api_key",
            )
        assert episode is not None
        return episode

    async def _complete(self, request: web.Request, episode: Episode) -> web.StreamResponse:
        call = read_call(await request.read())
        completion = await episode.complete(call)
        try:
            return await _send(request, completion)
        except BaseException:
            episode.forget(completion)
            raise

    async def _models(self, _: web.Request, __: Episode) -> web.StreamResponse:
        return _json({"object": "list", "data": [_described("policy")]})

    async def _model(self, request: web.Request, _: Episode) -> web.StreamResponse:
        return _json(_described(request.match_info["model"]))

    async def _reward(self, request: web.Request, episode: Episode) -> web.StreamResponse:
        try:
            told = msgspec.json.decode(await request.read(), type=_Reward)
        except msgspec.MsgspecError as error:
            raise RequestError(f"The body is no reward: {error}.") from error
        episode.set_reward(told.reward, completion_id=told.completion_id)
        return _json({"reward": told.reward})


class _Reward(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `/reward`."""

    reward: float
    completion_id: str | None = None


async def _end(episode: Episode) -> None:
    episode.end()


async def _send(request: web.Request, completion: Completion) -> web.StreamResponse:
    """Send the completion to its end, so that who asked is known to have it."""
    if not completion.call.is_streamed:
        response = _json(whole(completion))
        await response.prepare(request)
        await response.write_eof()
        return response
    stream = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await stream.prepare(request)
    for chunk in chunks(completion):
        await stream.write(chunk)
    await stream.write_eof()
    return stream


async def _no_such_path(request: web.Request, _: Episode) -> web.StreamResponse:
    path = request.path.partition(request.match_info["name"])[2]
    raise RequestError(
        f"There is no {request.method} {path} here. Answers are at /v1/chat/completions.",
        status=404,
        code="not_found",
    )


def _described(model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "arealite"}


def _json(
    value: object, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def _of_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


_default: Endpoint | None = None
_default_lock = threading.Lock()


def default_endpoint() -> Endpoint:
    """The endpoint of this process, made when first asked for and closed when Python exits."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Endpoint()
            atexit.register(_default.close)
        return _default
