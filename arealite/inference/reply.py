"""What a server says it sampled, as a `ModelResponse`, or an error: nothing is ever guessed."""

import math

import msgspec

from arealite.errors import TrajectoryError
from arealite.inference.reply_formats import Sampled, Span, is_whole, read_reply
from arealite.types import ModelResponse

FAILED_LOGPROB = -9998.0
"""vLLM writes -9999 for the log-prob of a token that weights with nan have sampled."""


class UnreadableReplyError(TrajectoryError):
    """In no format: cut off on its way, or from something that is no vLLM server. Worth a retry."""


class StaleReplyError(TrajectoryError):
    """The server has other weights than those it was given: it was restarted, or missed a push."""


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
        UnreadableReplyError: it is neither JSON nor MessagePack.
        StaleReplyError: it was sampled with weights older than `oldest_version`, or never pushed.
        TrajectoryError: tokens, log-probs and versions do not fit together.
    """
    sampled = _read(content)
    token_ids, logprobs, length = sampled.token_ids, sampled.logprobs, len(sampled.token_ids)
    if len(logprobs) != length:
        raise TrajectoryError(f"A server sent {len(logprobs)} log-probs for {length} tokens.")
    lowest, highest = sampled.logprob_range
    if not FAILED_LOGPROB < lowest <= highest < 1e-3:
        first = next(value for value in logprobs if not FAILED_LOGPROB < value < 1e-3)
        raise TrajectoryError(
            f"A server sent the log-prob {first}, which is not finite or not negative: its weights "
            "may hold nan."
        )
    least, greatest = sampled.id_range
    if not 0 <= least <= greatest < (vocab_size or math.inf):
        raise TrajectoryError(
            f"A server sent token ids from {least} to {greatest}; its model has "
            f"{vocab_size or 'no negative ones'}."
        )
    versions = _versions(sampled.spans, length)
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
        token_ids=token_ids,
        behavior_logprobs=logprobs,
        versions=versions,
        finish_reason=sampled.finish_reason,
    )


def _read(content: bytes) -> Sampled:
    try:
        sampled = read_reply(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        kind = TrajectoryError if is_whole(content) else UnreadableReplyError
        raise kind(
            f"A server's answer is not what vLLM's /inference/v1/generate gives: {error}. It "
            f"begins with {content[:80]!r}."
        ) from error
    if sampled.num_tokens not in (None, len(sampled.token_ids)):
        raise TrajectoryError(
            f"A server sent {len(sampled.token_ids)} tokens and counts {sampled.num_tokens} of "
            "them."
        )
    return sampled


def _versions(spans: list[Span] | None, length: int) -> list[int]:
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
