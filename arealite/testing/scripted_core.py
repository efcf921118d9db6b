"""The engine inside a scripted server: what runs, what is paused, which weights there are.

It follows vLLM 0.32's EngineCore in what a client can see of it. No network here, and no model.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

PauseMode = Literal["abort", "wait", "keep"]
MemoryTag = Literal["weights", "kv_cache"]
Script = Callable[[list[int]], Iterable[int]]
"""Token ids of the response to a prompt; may be endless, as the request's budget ends it."""

BASE_VERSION = "default"
"""vLLM's name for weights that nobody pushed."""
CACHE_BLOCK = 16


class CoreError(RuntimeError):
    """A call of the engine failed; vLLM answers 500 with this text."""


class PausedError(RuntimeError):
    """The engine takes no requests while it is paused; vLLM answers 503 with this text."""


@dataclass(eq=False, slots=True)
class Generation:
    """One request inside the engine, and in the end its response."""

    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)  # of the weights that sampled each token
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: int | None = None  # the id among the request's stop_token_ids that ended it
    has_started: bool = False

    def spans(self) -> list[dict[str, Any]]:
        """Runs of tokens that the same weights have sampled, as vLLM reports them."""
        spans: list[dict[str, Any]] = []
        start = 0
        for version, tokens in groupby(self.versions):
            end = start + len(list(tokens))
            spans.append({"version": version, "start": start, "end": end})
            start = end
        return spans


def logprob_of(token_id: int) -> float:
    """The log-prob that scripted tokens come with: between -2 and 0, exact in binary."""
    return -(1 + token_id % 16) / 8


def random_script(seed: int, vocab_size: int) -> Script:
    """Endless tokens that depend on the seed, the prompt and their position only."""

    def tokens(prompt: list[int]) -> Iterator[int]:
        chooser = random.Random(repr((seed, prompt)))
        while True:
            yield chooser.randrange(vocab_size)

    return tokens


class ScriptedCore:
    """One life of an engine, from its start with the weights of the model folder to its death.

    Args:
        max_num_seqs: requests that are sampled at the same time; the others wait.
        refuses_while_paused: whether new requests get a PausedError in the modes `wait` and
            `abort`; they queue otherwise, as they always do in the mode `keep`.
    """

    def __init__(
        self,
        script: Script,
        *,
        max_num_seqs: int,
        tokens_per_s: float | None,
        refuses_while_paused: bool,
    ) -> None:
        self._script = script
        self.max_num_seqs = max_num_seqs
        self._token_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._refuses_while_paused = refuses_while_paused
        self._pause_mode: PauseMode | None = None
        self._is_hung = False
        self._has_transport = False
        self._is_update_open = False
        self._asleep = set[MemoryTag]()
        self._generations: list[Generation] = []
        self._cached_blocks = set[int]()
        self._changed = asyncio.Event()
        self.version = BASE_VERSION
        self.num_prompt_tokens = 0
        self.num_sampled_tokens = 0
        self.num_cache_queries = 0
        self.num_cache_hits = 0

    @property
    def is_paused(self) -> bool:
        return self._pause_mode is not None

    @property
    def num_running(self) -> int:
        return sum(generation.has_started for generation in self._generations)

    @property
    def num_waiting(self) -> int:
        return len(self._generations) - self.num_running

    def hang(self, is_hung: bool) -> None:
        """Stop every step and every answer, as SIGSTOP does; or let them go on."""
        self._is_hung = is_hung
        self._notify()

    async def round_trip(self) -> None:
        """Return when the engine answers."""
        await self._until(lambda: not self._is_hung)

    async def generate(
        self, prompt: list[int], *, max_tokens: int, stop_token_ids: list[int]
    ) -> Generation:
        """The finished response to a prompt; cancel it when the client leaves.

        Raises:
            PausedError: the engine takes no requests now.
        """
        await self.round_trip()
        if self._refuses_while_paused and self._pause_mode in ("wait", "abort"):
            raise PausedError("The engine is paused; please retry")
        generation = Generation(prompt)
        self._generations.append(generation)
        try:
            await self._until(lambda: self._may_start() or generation.finish_reason is not None)
            if generation.finish_reason is None:
                self._start(generation)
                await self._sample(generation, max_tokens, stop_token_ids)
        finally:
            self._generations.remove(generation)
            if generation.has_started:
                self._cached_blocks.update(_block_keys(prompt + generation.token_ids))
            self._notify()
        await self.round_trip()
        return generation

    async def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        """Return when no request samples any more."""
        self._pause_mode = mode
        if mode == "abort":
            for generation in self._generations:
                generation.finish_reason = "abort"
        self._notify()
        if mode != "keep":
            await self._until(lambda: self.num_running == 0)
        if clear_cache:
            self._cached_blocks.clear()

    def resume(self) -> None:
        if self._asleep:
            raise _failed_call("the engine was resumed without the memory that it works in")
        self._pause_mode = None
        self._notify()

    async def sleep(self, level: int, mode: PauseMode) -> None:
        """Pause; above level 0 also give the memory of weights and cache up."""
        await self.pause(mode, clear_cache=level >= 1)
        if level >= 1:
            self._asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: set[MemoryTag]) -> bool:
        """Take the memory back, of everything without tags; whether all is there again."""
        self._asleep -= tags or self._asleep
        if not self._asleep:
            self.resume()
        return not self._asleep

    def init_transfer(self) -> None:
        """Remember that a trainer has introduced itself; its weights are never read."""
        self._has_transport = True

    def start_update(self) -> None:
        if self._is_update_open:
            raise _failed_call(
                "start_weight_update called while a weight update is already active. "
                "Call finish_weight_update first."
            )
        self._is_update_open = True

    def update(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Take one part of an update; one that fails closes the update."""
        if not self._is_update_open:
            raise _failed_call("start_weight_update must be called before update_weights.")
        if isinstance(update_info, dict) and update_info.get("is_abandoned"):
            self._is_update_open = False
            raise _failed_call("this weight update was abandoned; a new one may start")
        if "weights" in self._asleep:
            self._is_update_open = False
            raise _failed_call("an illegal memory access was encountered: the weights are asleep")
        if not self._has_transport:
            self._is_update_open = False
            raise _failed_call("tensors need init_weight_transfer_engine with a region first")

    def finish_update(self, version: str | None) -> None:
        if not self._is_update_open:
            raise _failed_call(
                "finish_weight_update called without a matching start_weight_update."
            )
        self._is_update_open = False
        if version is not None:
            self.version = version

    # --- One request ------------------------------------------------------------------------------

    def _may_start(self) -> bool:
        has_room = self.num_running < self.max_num_seqs
        return has_room and not self._is_hung and not self.is_paused

    def _may_step(self) -> bool:
        return not self._is_hung and self._pause_mode != "keep"

    def _start(self, generation: Generation) -> None:
        generation.has_started = True
        num_hits = 0
        for key in _block_keys(generation.prompt):
            if key not in self._cached_blocks:
                break
            num_hits += CACHE_BLOCK
        self.num_cache_queries += len(generation.prompt)
        self.num_cache_hits += num_hits
        self.num_prompt_tokens += len(generation.prompt)

    async def _sample(
        self, generation: Generation, max_tokens: int, stop_token_ids: list[int]
    ) -> None:
        for token_id in self._script(generation.prompt):
            if len(generation.token_ids) == max_tokens:
                generation.finish_reason = "length"
                return
            await asyncio.sleep(self._token_s)
            await self._until(lambda: self._may_step() or generation.finish_reason is not None)
            if generation.finish_reason is not None:  # aborted
                return
            if not isinstance(token_id, int):
                raise TypeError(f"a script gives token ids, not {token_id!r:.80}")
            generation.token_ids.append(token_id)
            generation.versions.append(self.version)
            self.num_sampled_tokens += 1
            if token_id in stop_token_ids:
                generation.stop_reason = token_id
                break
        generation.finish_reason = "stop"

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _block_keys(token_ids: list[int]) -> Iterator[int]:
    """One key for each full block and all before it; the last token is always computed again."""
    key = 0
    for end in range(CACHE_BLOCK, len(token_ids), CACHE_BLOCK):
        key = hash((key, *token_ids[end - CACHE_BLOCK : end]))
        yield key


def _failed_call(reason: str) -> CoreError:
    """A worker's error in the words in which it reaches the client."""
    return CoreError(
        f"Call to collective_rpc method failed: Worker failed with error '{reason}', please check "
        "the stack trace above for the root cause"
    )
