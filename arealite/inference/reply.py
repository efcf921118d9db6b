"""What a server says it sampled, as a `ModelResponse`, or an error: nothing is ever guessed."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec

from arealite.errors import TrajectoryError
from arealite.types import ModelResponse

FAILED_LOGPROB = -9998.0
"""vLLM writes -9999 for the log-prob of a token that weights with nan have sampled."""


READING_S = 0.0005
"""Out of each turn of the event loop, for replies that have arrived together."""


class UnreadableReplyError(TrajectoryError):
    """Not JSON: cut off on its way, or from something that is no vLLM server. Worth a retry."""


class StaleReplyError(TrajectoryError):
    """The server has other weights than those it was given: it was restarted, or missed a push."""


# gc=False: nothing here can be part of a cycle, and 16,384 objects a reply would make Python look
# through all there are, torch's included, again and again: a quarter of a second each time.
class _Logprob(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Logprob]


class _Span(msgspec.Struct, gc=False):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct, gc=False):
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort"]
    logprobs: _Logprobs
    weight_versions: list[_Span] | None = None


class _Usage(msgspec.Struct, gc=False):
    completion_tokens: int


class _Reply(msgspec.Struct, gc=False):
    choices: list[_Choice]
    usage: _Usage | None = None


_DECODER = msgspec.json.Decoder(_Reply)


def parse_reply(
    content: bytes,
    *,
    vocab_size: int | None = None,
    oldest_version: int | None = None,
    latest_version: int | None = None,
) -> ModelResponse:
    """The response that a reply of `/inference/v1/generate` holds, each token checked.

    Args:
        vocab_size: token ids are below it.
        oldest_version: version that the server was known to have when it was asked.
        latest_version: newest version that a server can have by now.

    Raises:
        UnreadableReplyError: it is not JSON.
        StaleReplyError: it was sampled with weights older than `oldest_version`, or never pushed.
        TrajectoryError: tokens, log-probs and versions do not fit together.
    """
    choice = _choice(content)
    length = len(choice.token_ids)
    logprobs = [entry.logprob for entry in choice.logprobs.content]
    if len(logprobs) != length:
        raise TrajectoryError(f"A server sent {len(logprobs)} log-probs for {length} tokens.")
    if length and not FAILED_LOGPROB < min(logprobs) <= max(logprobs) < 1e-3:  # JSON has no nan
        [first, *_] = [logprob for logprob in logprobs if not FAILED_LOGPROB < logprob < 1e-3]
        raise TrajectoryError(
            f"A server sent the log-prob {first}, which is not finite or not negative: its weights "
            "may hold nan."
        )
    if length and not 0 <= min(choice.token_ids) <= max(choice.token_ids) < (
        vocab_size or math.inf
    ):
        raise TrajectoryError(
            f"A server sent token ids from {min(choice.token_ids)} to {max(choice.token_ids)}; its "
            f"model has {vocab_size or 'no negative ones'}."
        )
    versions = _versions(choice.weight_versions, length)
    if versions and oldest_version is not None and versions[0] < oldest_version:
        raise StaleReplyError(
            f"A server sampled with weights of version {versions[0]} after it was given "
            f"{oldest_version}."
        )
    if versions and latest_version is not None and versions[-1] > latest_version:
        raise TrajectoryError(
            f"A server sampled with weights of version {versions[-1]}, but the latest is "
            f"{latest_version}: does another run push to it?"
        )
    return ModelResponse(
        token_ids=choice.token_ids,
        behavior_logprobs=logprobs,
        versions=versions,
        finish_reason=choice.finish_reason,
    )


class ReplyReader:
    """Parses replies on the event loop, a few in each of its turns: nothing else shall wait."""

    def __init__(self) -> None:
        self._waiting = deque[tuple[asyncio.Future[ModelResponse], Callable[[], ModelResponse]]]()

    async def parse(self, content: bytes, **limits: Any) -> ModelResponse:
        """What `parse_reply` gives, once it is this reply's turn."""
        loop = asyncio.get_running_loop()
        outcome = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._parse_some)
        self._waiting.append((outcome, partial(parse_reply, content, **limits)))
        return await outcome

    def _parse_some(self) -> None:
        until_s = time.perf_counter() + READING_S
        while self._waiting and time.perf_counter() < until_s:
            outcome, parse = self._waiting.popleft()
            if outcome.cancelled():
                continue
            try:
                outcome.set_result(parse())
            except Exception as error:
                outcome.set_exception(error)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._parse_some)


def _choice(content: bytes) -> _Choice:
    try:
        reply = _DECODER.decode(content)
        [choice] = reply.choices
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        kind = TrajectoryError if _is_json(content) else UnreadableReplyError
        raise kind(
            f"A server's answer is not what vLLM's /inference/v1/generate gives: {error}. It "
            f"begins with {content[:80]!r}."
        ) from error
    if reply.usage is not None and reply.usage.completion_tokens != len(choice.token_ids):
        raise TrajectoryError(
            f"A server sent {len(choice.token_ids)} tokens and counts "
            f"{reply.usage.completion_tokens} of them."
        )
    return choice


def _is_json(content: bytes) -> bool:
    try:
        msgspec.json.decode(content, type=msgspec.Raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


def _versions(spans: list[_Span] | None, length: int) -> list[int]:
    """Weight version of each of `length` tokens, from spans that must partition them."""
    versions: list[int] = []
    is_partition = True
    for span in spans or []:
        if not span.start == len(versions) <= span.end <= length:
            is_partition = False
            break
        if not _is_version(span.version):
            raise StaleReplyError(
                f"A server sampled with weights of version {span.version!r}, which no push gave. "
                "Push once before the first rollout."
            )
        if versions and int(span.version) < versions[-1]:
            is_partition = False
            break
        versions += [int(span.version)] * (span.end - span.start)
    if not is_partition or len(versions) != length:
        raise TrajectoryError(
            f"A server sent the weight versions {(spans or [])[:4]} for {length} tokens. They must "
            "partition the tokens, in the order in which they were pushed."
        )
    return versions


def _is_version(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16
