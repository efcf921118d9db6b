"""What a reply of `/inference/v1/generate` says, in either of two formats.

vLLM sends JSON, some 140 bytes for a token, most of them names of fields. For a client that accepts
`COMPACT`, our guard on the server puts the same facts into MessagePack, ids and log-probs as plain
arrays: 12 bytes for a token, and a seventh of the time to read them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

COMPACT = "application/vnd.arealite.sampled+msgpack"
"""Media type, in the Accept of a request and the Content-Type of a reply."""


# gc=False: nothing here can be part of a cycle, and 16,384 objects a reply would make Python look
# through all there are, torch's included, again and again: a quarter of a second each time.
class Span(msgspec.Struct, gc=False):
    """Tokens from `start` up to `end` were sampled with weights of this version."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One response as its server tells it; whether the facts fit together is not checked here."""

    token_ids: list[int]
    logprobs: list[float]
    id_range: tuple[float, float]  # least and greatest; (0, 0) without tokens, here and below
    logprob_range: tuple[float, float]  # nan if any of them is
    finish_reason: Literal["stop", "length", "abort"]
    spans: list[Span] | None
    num_tokens: int | None  # by the server's count


class _Logprob(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Logprob]


class _Choice(msgspec.Struct, gc=False):
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: _Logprobs
    weight_versions: list[Span] | None = None


class _Usage(msgspec.Struct, gc=False):
    completion_tokens: int


class _Reply(msgspec.Struct, gc=False):
    choices: list[_Choice]
    usage: _Usage | None = None
    request_id: str = ""


class _Compact(msgspec.Struct, gc=False):
    request_id: str
    token_ids: bytes
    logprobs: bytes
    finish_reason: Literal["stop", "length", "abort"]
    spans: list[Span] | None
    num_tokens: int | None


_IDS, _LOGPROBS = np.dtype("<i4"), np.dtype("<f8")  # of the arrays in the compact format
_JSON_DECODER = msgspec.json.Decoder(_Reply)
_COMPACT_DECODER = msgspec.msgpack.Decoder(_Compact)


def read_reply(content: bytes) -> Sampled:
    """The facts of a reply in either format.

    Raises:
        msgspec.MsgspecError, ValueError, RecursionError: it is in neither.
    """
    return _read_compact(content) if _is_compact(content) else _read_json(content)


def compact(content: bytes) -> bytes | None:
    """A reply of vLLM's as `COMPACT`; None if it is not one that can be told in full."""
    try:
        reply, choice, logprobs = _decode_json(content)
        facts = _Compact(
            request_id=reply.request_id,
            token_ids=np.array(choice.token_ids, _IDS).tobytes(),
            logprobs=np.array(logprobs, _LOGPROBS).tobytes(),
            finish_reason=choice.finish_reason,
            spans=choice.weight_versions,
            num_tokens=reply.usage and reply.usage.completion_tokens,
        )
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return None
    return msgspec.msgpack.encode(facts)


def _decode_json(content: bytes) -> tuple[_Reply, _Choice, list[float]]:
    reply = _JSON_DECODER.decode(content)
    [choice] = reply.choices
    return reply, choice, [entry.logprob for entry in choice.logprobs.content]


def _read_json(content: bytes) -> Sampled:
    reply, choice, logprobs = _decode_json(content)
    token_ids = choice.token_ids
    return Sampled(
        token_ids=token_ids,
        logprobs=logprobs,
        id_range=(min(token_ids, default=0), max(token_ids, default=0)),
        logprob_range=(min(logprobs, default=0), max(logprobs, default=0)),  # JSON has no nan
        finish_reason=choice.finish_reason,
        spans=choice.weight_versions,
        num_tokens=reply.usage and reply.usage.completion_tokens,
    )


def _read_compact(content: bytes) -> Sampled:
    facts = _COMPACT_DECODER.decode(content)
    token_ids = np.frombuffer(facts.token_ids, _IDS)
    logprobs = np.frombuffer(facts.logprobs, _LOGPROBS)
    return Sampled(
        token_ids=token_ids.tolist(),
        logprobs=logprobs.tolist(),
        id_range=_range(token_ids),
        logprob_range=_range(logprobs),
        finish_reason=facts.finish_reason,
        spans=facts.spans,
        num_tokens=facts.num_tokens,
    )


def _range(values: "np.ndarray[Any, Any]") -> tuple[float, float]:
    return (values.min().item(), values.max().item()) if values.size else (0, 0)


def is_whole(content: bytes) -> bool:
    """Whether it is JSON or MessagePack at all, whatever it says."""
    try:
        if _is_compact(content):
            msgspec.msgpack.decode(content)
        else:
            msgspec.json.decode(content, type=msgspec.Raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


def _is_compact(content: bytes) -> bool:
    """By its first byte: that of a map in MessagePack can begin no JSON."""
    return content[:1] >= b"\x80"
