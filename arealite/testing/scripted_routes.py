"""vLLM's routes in vLLM's words, in front of a `ScriptedCore`.

Paths, statuses and texts are those of vLLM 0.32 with the development routes, and /arealite/model,
which arealite's own middleware adds to a server.
"""

import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from aiohttp import web

from arealite.testing.scripted_core import (
    CoreError,
    Generation,
    MemoryTag,
    PausedError,
    PauseMode,
    ScriptedCore,
    logprob_of,
)

VLLM_VERSION = "0.32.0"

Body = TypeVar("Body", bound=msgspec.Struct)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def errors_as_vllm(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler's reply, or its error with the status and the words of vLLM."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return json_reply({"detail": error.reason}, status=error.status)
    except msgspec.MsgspecError as error:
        return _error(400, f"1 validation error:\n  {error}", "Bad Request")
    except PausedError as error:
        return _error(503, str(error), "ServiceUnavailableError")
    except CoreError as error:
        return _error(500, str(error), "InternalServerError")
    except Exception as error:  # of the test's script, most likely
        traceback.print_exc()
        text = f"The script raised {type(error).__name__}: {error}"
        return _error(500, text, "InternalServerError")


class Routes:
    """What can be asked of a server, in one life of its engine."""

    def __init__(
        self, core: ScriptedCore, *, model: str, max_model_len: int, vocab_size: int
    ) -> None:
        self._core = core
        self._model = model
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size

    def table(self) -> list[web.RouteDef]:
        """Every path with its handler."""
        return [
            web.get("/health", self._health),
            web.get("/version", self._version),
            web.get("/metrics", self._metrics),
            web.get("/v1/models", self._models),
            web.get("/arealite/model", self._arealite_model),
            web.get("/is_paused", self._is_paused),
            web.get("/weight_info", self._weight_info),
            web.post("/inference/v1/generate", self._generate),
            web.post("/pause", self._pause),
            web.post("/resume", self._resume),
            web.post("/sleep", self._sleep),
            web.post("/wake_up", self._wake_up),
            web.post("/init_weight_transfer_engine", self._init_transfer),
            web.post("/start_weight_update", self._start_update),
            web.post("/update_weights", self._update),
            web.post("/finish_weight_update", self._finish_update),
            web.post("/update_weight_version", self._update_version),
        ]

    # --- Routes that answer without the engine ----------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return json_reply({"version": VLLM_VERSION})

    async def _models(self, _: web.Request) -> web.Response:
        card = {"id": self._model, "object": "model", "created": 0, "owned_by": "vllm"}
        card |= {"root": self._model, "parent": None, "max_model_len": self._max_model_len}
        return json_reply({"object": "list", "data": [card | {"permission": []}]})

    async def _arealite_model(self, _: web.Request) -> web.Response:
        limits = {"vocab_size": self._vocab_size, "max_num_seqs": self._core.max_num_seqs}
        return json_reply(limits)

    async def _metrics(self, _: web.Request) -> web.Response:
        core = self._core
        lines: list[str] = []
        for name, kind, value in (
            ("vllm:num_requests_running", "gauge", core.num_running),
            ("vllm:num_requests_waiting", "gauge", core.num_waiting),
            ("vllm:prefix_cache_queries_total", "counter", core.num_cache_queries),
            ("vllm:prefix_cache_hits_total", "counter", core.num_cache_hits),
            ("vllm:prompt_tokens_total", "counter", core.num_prompt_tokens),
            ("vllm:generation_tokens_total", "counter", core.num_sampled_tokens),
        ):
            lines.append(f"# TYPE {name} {kind}")
            lines.append(f'{name}{{engine="0",model_name="{self._model}"}} {float(value)}')
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    # --- Routes that ask the engine ---------------------------------------------------------------

    async def _is_paused(self, _: web.Request) -> web.Response:
        await self._core.round_trip()
        return json_reply({"is_paused": self._core.is_paused})

    async def _weight_info(self, _: web.Request) -> web.Response:
        await self._core.round_trip()
        return json_reply({"weight_version": self._core.version})

    async def _generate(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            raise msgspec.ValidationError(
                "Unsupported Media Type: Only 'application/json' is allowed"
            )
        asked = await _decoded(request, _GenerateBody)
        refusal = self._refusal(asked.token_ids)
        if refusal:
            return _error(400, refusal, "BadRequestError")
        params = asked.sampling_params
        room = self._max_model_len - len(asked.token_ids)
        generation = await self._core.generate(
            asked.token_ids,
            max_tokens=min(params.max_tokens or room, room),
            stop_token_ids=params.stop_token_ids,
        )
        request_id = request.headers.get("X-Request-Id") or asked.request_id or uuid.uuid4().hex
        return json_reply(
            {"request_id": f"generate-tokens-{request_id}", "model": self._model}
            | _generate_reply(generation, asked.sampling_params)
        )

    async def _pause(self, request: web.Request) -> web.Response:
        query = msgspec.convert(dict(request.query), _PauseQuery, strict=False)
        await self._core.round_trip()
        await self._core.pause(query.mode, clear_cache=query.clear_cache)
        return json_reply({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        await self._core.round_trip()
        self._core.resume()
        return json_reply({"status": "resumed"})

    async def _sleep(self, request: web.Request) -> web.Response:
        query = msgspec.convert(dict(request.query), _SleepQuery, strict=False)
        await self._core.round_trip()
        await self._core.sleep(query.level, query.mode)
        return json_reply({"status": "sleeping", "level": query.level})

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = msgspec.convert(set(request.query.getall("tags", [])), set[MemoryTag])
        await self._core.round_trip()
        is_awake = self._core.wake_up(tags)
        return json_reply(
            {"status": "awake" if is_awake else "sleeping", "tags": sorted(tags) or None}
        )

    async def _init_transfer(self, request: web.Request) -> web.Response:
        await _decoded(request, _InitBody)
        await self._core.round_trip()
        self._core.init_transfer()
        return json_reply({"message": "Weight transfer initialized"})

    async def _start_update(self, _: web.Request) -> web.Response:
        await self._core.round_trip()
        self._core.start_update()
        return json_reply({"message": "Weight update started"})

    async def _update(self, request: web.Request) -> web.Response:
        body = await _decoded(request, _UpdateBody)
        await self._core.round_trip()
        self._core.update(body.update_info)
        return json_reply({"message": "Weights updated"})

    async def _finish_update(self, request: web.Request) -> web.Response:
        has_body = bool(await request.read())
        body = await _decoded(request, _FinishBody) if has_body else _FinishBody()
        await self._core.round_trip()
        self._core.finish_update(body.weight_version)
        return json_reply({"message": "Weight update finished"})

    async def _update_version(self, request: web.Request) -> web.Response:
        body = await _decoded(request, _VersionBody)
        await self._core.round_trip()
        self._core.version = body.new_version
        return json_reply({"success": True, "new_version": body.new_version})

    def _refusal(self, prompt: list[int]) -> str:
        """Why vLLM would not take this prompt; empty if it would."""
        limit = self._max_model_len
        if max(prompt) >= self._vocab_size:
            return f"Token id {max(prompt)} is out of vocabulary"
        if len(prompt) > limit:
            return (
                f"This model's maximum context length is {limit} tokens. However, your prompt "
                f"contains {len(prompt)} input tokens, which exceeds this limit even without any "
                "output tokens. Please reduce the length of the input prompt."
            )
        if len(prompt) == limit:
            return (
                f"The decoder prompt (length {limit}) plus the number of requested output tokens "
                f"(at least 1) is longer than the maximum model length of {limit}. Make sure that "
                "`max_model_len` is no smaller than the number of text tokens (prompt + requested "
                "output tokens)."
            )
        return ""


# --- Requests: what is not here is ignored --------------------------------------------------------


class _SamplingParams(msgspec.Struct):
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: int | None = None
    stop_token_ids: list[int] = []


class _GenerateBody(msgspec.Struct):
    token_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)]
    sampling_params: _SamplingParams
    request_id: str = ""


class _PauseQuery(msgspec.Struct):
    mode: PauseMode = "abort"
    clear_cache: bool = True


class _SleepQuery(msgspec.Struct):
    level: Annotated[int, msgspec.Meta(ge=0, le=2)] = 1
    mode: PauseMode = "abort"


class _InitBody(msgspec.Struct):
    init_info: dict[str, Any]


class _UpdateBody(msgspec.Struct):
    update_info: dict[str, Any] | list[dict[str, Any]]


class _FinishBody(msgspec.Struct):
    weight_version: str | None = None


class _VersionBody(msgspec.Struct):
    new_version: str


async def _decoded(request: web.Request, kind: type[Body]) -> Body:
    return msgspec.json.decode(await request.read(), type=kind)


# --- Replies --------------------------------------------------------------------------------------


def _generate_reply(done: Generation, params: _SamplingParams) -> dict[str, Any]:
    """All that vLLM answers but names, with the fields that do not apply here as null."""
    num_prompt, num_sampled = len(done.prompt), len(done.token_ids)
    has_logprobs = params.logprobs is not None
    return {
        "created": 0,
        "usage": {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt + num_sampled,
            "completion_tokens": num_sampled,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "prompt_logprobs": None,
        "prompt_token_id_logprobs": None,
        "prompt_token_ids": None,
        "mm_placeholders": None,
        "metrics": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "output_mode": "tokens",
        "choices": [
            {
                "index": 0,
                "finish_reason": done.finish_reason,
                "stop_reason": done.stop_reason,
                "token_ids": done.token_ids,
                "routed_experts": None,
                "sampling_mask": None,
                "weight_versions": done.spans(),
                "logprobs": {"content": [_logprob_entry(token_id) for token_id in done.token_ids]}
                if has_logprobs
                else None,
            }
        ],
    }


def _logprob_entry(token_id: int) -> dict[str, Any]:
    entry = {"token_id": token_id, "logprob": logprob_of(token_id), "rank": 1}
    return entry | {"top_logprobs": [entry]}


def _error(status: int, message: str, kind: str) -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json_reply({"error": error}, status=status)


def json_reply(content: Any, *, status: int = 200) -> web.Response:
    """A reply with this body."""
    return web.Response(
        body=msgspec.json.encode(content), status=status, content_type="application/json"
    )
