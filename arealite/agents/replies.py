"""Answers as OpenAI's API writes them: one object, a stream of chunks, or an error."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from arealite.agents.requests import ChatCall, RequestError
from arealite.rollout.chat_template import Message
from arealite.types import FinishReason

Json = dict[str, Any]

_PIECES = re.compile(r"\S+\s*|\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One sampled answer. L tokens, the end token included."""

    message: Message
    finish_reason: FinishReason
    num_tokens: int
    tokens: list[str]  # [L] the text of each; empty unless log-probs are asked for
    logprobs: list[float]  # the same, at the run's temperature
    version: int  # of the weights that sampled the last token


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """All choices of one call."""

    id: str
    call: ChatCall
    choices: Sequence[Choice]
    num_prompt_tokens: int


def whole(completion: Completion) -> Json:
    """The completion as one object."""
    choices = [
        {
            "index": index,
            "message": _answer(choice.message),
            "finish_reason": _finish_reason(choice),
            "logprobs": _logprobs(choice) if completion.call.has_logprobs else None,
        }
        for index, choice in enumerate(completion.choices)
    ]
    return _envelope(completion, "chat.completion") | {
        "choices": choices,
        "usage": _usage(completion),
    }


def chunks(completion: Completion) -> Iterator[bytes]:
    """The completion as server-sent events, one for each word and call."""
    envelope = _envelope(completion, "chat.completion.chunk")
    for index, choice in enumerate(completion.choices):
        logprobs = _logprobs(choice) if completion.call.has_logprobs else None
        for delta in _deltas(choice.message):
            part = {"index": index, "delta": delta, "finish_reason": None, "logprobs": logprobs}
            yield _event(envelope | {"choices": [part]})
            logprobs = None  # all of them came with the first
        end = {"index": index, "delta": {}, "finish_reason": _finish_reason(choice)}
        yield _event(envelope | {"choices": [end]})
    if completion.call.has_usage_chunk:
        yield _event(envelope | {"choices": [], "usage": _usage(completion)})
    yield b"data: [DONE]\n\n"


def refusal(error: RequestError) -> Json:
    """The error as an object."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def _envelope(completion: Completion, kind: str) -> Json:
    return {
        "id": completion.id,
        "object": kind,
        "created": int(time.time()),
        "model": completion.call.model,
        "system_fingerprint": f"weights-{completion.choices[0].version}",
    }


def _answer(message: Message) -> Json:
    has_only_calls = bool(message.get("tool_calls")) and not message["content"]
    return message | {"content": None if has_only_calls else message["content"], "refusal": None}


def _deltas(message: Message) -> Iterator[Json]:
    yield {"role": "assistant", "content": ""}
    for name in ("reasoning_content", "content"):
        for piece in _PIECES.findall(message.get(name) or ""):
            yield {name: piece}
    for index, call in enumerate(message.get("tool_calls") or []):
        yield {"tool_calls": [{"index": index, **call}]}


def _finish_reason(choice: Choice) -> str:
    if choice.finish_reason != "stop":
        return "length"
    return "tool_calls" if choice.message.get("tool_calls") else "stop"


def _logprobs(choice: Choice) -> Json:
    entries = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in zip(choice.tokens, choice.logprobs, strict=True)
    ]
    return {"content": entries, "refusal": None}


def _usage(completion: Completion) -> Json:
    num_sampled = sum(choice.num_tokens for choice in completion.choices)
    return {
        "prompt_tokens": completion.num_prompt_tokens,
        "completion_tokens": num_sampled,
        "total_tokens": completion.num_prompt_tokens + num_sampled,
    }


def _event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
