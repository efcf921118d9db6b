"""An asynchronous client of vLLM servers: tokens out with their log-probs and weight versions.

    request -> least loaded server -> POST /inference/v1/generate -> checked ModelResponse
    weights -> pause -> start, update ..., finish -> resume, on every server

vllm itself is never imported here: the servers run in processes of their own.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
import tenacity
import torch

from arealite import background
from arealite.errors import PromptTooLongError, ServerError, TrajectoryError
from arealite.inference.transport import Disk, SharedMemory, Transport
from arealite.types import ModelRequest, ModelResponse

CONTROL_TIMEOUT_S = 120.0
"""Limit of each single call that pauses, updates or resumes a server."""


class _Logprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Logprob]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: _Logprobs
    weight_versions: list[_Span] | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice]


class _RetryableError(ServerError):
    """The same request may succeed a moment later."""


class VLLMEngine:
    """`InferenceEngine` over running vLLM servers. Use it as a context manager, or close it.

    Args:
        addresses: `http://host:port` of each server; `serve()` gives them.
        weights_dir: a folder that this process and all servers see. Needed for servers on other
            hosts; servers on this one take weights through shared memory.
        request_timeout_s: limit of one generation, waiting in the server's queue included.

    Raises:
        ServerError: no server answers at an address, or it was not started by `serve`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        weights_dir: str | Path | None = None,
        request_timeout_s: float = 600.0,
    ) -> None:
        self.version = -1
        self._addresses = [address.rstrip("/") for address in addresses]
        self._weights_dir = weights_dir
        self._timeout_s = request_timeout_s
        self._load = Counter[str]()
        self._session: aiohttp.ClientSession | None = None
        self._transport: Transport | None = None
        self._decoder = msgspec.json.Decoder(_Reply)
        try:
            lengths = self._control(self._each(self._max_model_len), "connecting to the servers")
        except BaseException:
            self.close()
            raise
        self.max_model_len = min(lengths)
        """Prompt and response together may have this many tokens."""

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        """Sample one response; a passing fault of a server is tried again elsewhere.

        Raises:
            PromptTooLongError: the context has no room for one more token.
            ServerError: no server gave a usable answer.
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
        budget = min(request.sampling.max_new_tokens, room)
        body = msgspec.json.encode(_generate_body(request, budget))
        retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_RetryableError),
            stop=tenacity.stop_after_attempt(4),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        content = await retry(self._post_generate, body)
        response = _checked(self._decode(content))
        if response.finish_reason == "length" and budget < request.sampling.max_new_tokens:
            return replace(response, finish_reason="context")
        return response

    def pause(self) -> None:
        """Freeze running requests in place; new ones queue. Their KV is recomputed on resume."""
        self._post_all("/pause?mode=keep&clear_cache=true")

    def resume(self) -> None:
        """Let the requests go on."""
        self._post_all("/resume")

    def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Send full tensors, under their Hugging Face names, to every server.

        Only the process that talks to the servers calls this; `push_weights` sees to it.
        """
        if self._transport is None:
            self._transport = self._connect_transport()
        self._post_all("/start_weight_update")
        for update in self._transport.updates(weights):
            self._post_all("/update_weights", {"update_info": update})
        self._post_all("/finish_weight_update", {"weight_version": str(version)})
        self.version = version

    def close(self) -> None:
        """Close all connections. The servers stay; `serve()` owns them."""
        if self._session is not None:
            background.run(self._session.close(), timeout_s=10, what="closing connections")
        self._session = None
        if self._transport is not None:
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect_transport(self) -> Transport:
        if self._weights_dir is not None:
            transport: Transport = Disk(self._weights_dir)
        elif all(_is_local(address) for address in self._addresses):
            transport = SharedMemory()
        else:
            raise ServerError(
                "Servers on other hosts take weights through a folder that both sides see: pass "
                "VLLMEngine(..., weights_dir=FOLDER)."
            )
        self._post_all("/init_weight_transfer_engine", {"init_info": transport.init_info()})
        transport.connected()
        return transport

    def _decode(self, content: bytes) -> _Choice:
        try:
            [choice] = self._decoder.decode(content).choices
        except (msgspec.MsgspecError, ValueError) as error:
            raise TrajectoryError(
                f"A server's answer is not what vLLM's /inference/v1/generate gives: {error}. "
                f"It begins with {content[:80]!r}."
            ) from error
        return choice

    async def _post_generate(self, body: bytes) -> bytes:
        address = min(self._addresses, key=lambda address: self._load[address])
        self._load[address] += 1
        try:
            return await self._request("POST", address, "/inference/v1/generate", body)
        finally:
            self._load[address] -= 1

    async def _request(
        self, method: str, address: str, path: str, body: bytes | None = None
    ) -> bytes:
        headers = {"Content-Type": "application/json"}
        try:
            async with self._connected().request(
                method, address + path, data=body, headers=headers
            ) as reply:
                content = await reply.read()
        except TimeoutError as error:
            raise ServerError(
                f"{address}{path} did not answer within {self._timeout_s:.0f} s."
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _RetryableError(
                f"No vLLM server answered at {address} ({type(error).__name__}). Start one with "
                "`arealite serve --model MODEL`, or leave server.addresses empty to start it."
            ) from error
        if reply.status == 200:
            return content
        failure = (
            f"{address}{path} answered {reply.status}: {content[:500].decode(errors='replace')}"
        )
        if reply.status in (408, 425, 429) or reply.status >= 500:
            raise _RetryableError(failure)
        raise ServerError(failure)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            # vLLM's server closes idle connections after 5 s; a longer-lived pool would race it.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
            timeout = aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=10)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._session

    async def _max_model_len(self, address: str) -> int:
        content = await self._request("GET", address, "/v1/models")
        try:
            return int(msgspec.json.decode(content)["data"][0]["max_model_len"])
        except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"{address} is not a vLLM server: /v1/models answered {content[:80]!r}."
            ) from error

    def _post_all(self, path: str, body: dict[str, Any] | None = None) -> None:
        content = msgspec.json.encode(body or {})

        async def post(address: str) -> bytes:
            return await self._request("POST", address, path, content)

        self._control(self._each(post), f"{path} on {', '.join(self._addresses)}")

    async def _each(self, call: Any) -> list[Any]:
        return list(await asyncio.gather(*(call(address) for address in self._addresses)))

    def _control(self, coroutine: Coroutine[Any, Any, list[Any]], what: str) -> list[Any]:
        return background.run(coroutine, timeout_s=CONTROL_TIMEOUT_S, what=what)


def _generate_body(request: ModelRequest, budget: int) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "token_ids": request.token_ids,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": budget,
            "logprobs": 0,
            "detokenize": False,
        },
    }


def _checked(choice: _Choice) -> ModelResponse:
    """The choice as a response, or an error: nothing about a token is ever guessed."""
    logprobs = [entry.logprob for entry in choice.logprobs.content]
    length = len(choice.token_ids)
    if len(logprobs) != length:
        raise TrajectoryError(f"A server sent {len(logprobs)} log-probs for {length} tokens.")
    if not all(math.isfinite(logprob) and -9998 < logprob < 1e-3 for logprob in logprobs):
        raise TrajectoryError(
            "A server sent a log-prob that is not finite or not negative: its weights may hold nan."
        )
    if any(token < 0 for token in choice.token_ids):
        raise TrajectoryError("A server sent a negative token id.")
    return ModelResponse(
        token_ids=choice.token_ids,
        behavior_logprobs=logprobs,
        versions=_versions(choice.weight_versions, length),
        finish_reason=choice.finish_reason,
    )


def _versions(spans: list[_Span] | None, length: int) -> list[int]:
    """Weight version of each of `length` tokens, from spans that must partition them."""
    versions: list[int] = []
    for span in spans or []:
        if span.start != len(versions) or span.end < span.start or not span.version.isdigit():
            break
        versions += [int(span.version)] * (span.end - span.start)
    if len(versions) != length:
        raise TrajectoryError(
            f"A server sent the weight versions {spans} for {length} tokens. They must partition "
            "the tokens, each with a version that push_weights gave: push once before the first "
            "rollout."
        )
    return versions


def _is_local(address: str) -> bool:
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
