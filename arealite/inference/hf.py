"""An engine inside this process: transformers samples, on a thread of its own.

    agenerate --> waiting --> batch --> step --> step --> ... --> ModelResponse
    any loop                  |     forward, sample one token for each sequence
                              pause, weights, resume: only between two steps

For notebooks, tests, and machines without vLLM; what it samples agrees with plain transformers.

N sequences in a batch, W the longest of their contexts, V words in the vocabulary.
"""

import asyncio
import atexit
import math
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from arealite import dist
from arealite.data.models import load_tokenizer, resolve_model
from arealite.errors import (
    ArealiteError,
    ConfigError,
    DataError,
    PromptTooLongError,
    ServerError,
    TrajectoryError,
)
from arealite.types import FinishReason, ModelRequest, ModelResponse, SamplingParams
from arealite.waits import waiting

MAX_BATCHES = 4
"""Batches that take turns; of one more, the two smallest become one, and its cache is made anew."""


class HFEngine:
    """`InferenceEngine` over a model in this process. Use it as a context manager, or close it.

    Before the first push it samples with the weights on disk, as version -1.

    Args:
        model: Hugging Face id or folder of a causal language model.
        dtype: of weights and computation. bfloat16 takes half the memory, and its log-probs then
            differ from the trainer's by a rounding.
        device: by default the current CUDA device, or the CPU where there is none.
        kv: what becomes of the keys and values of running sequences when new weights come:
            "recompute" makes them anew, "reuse" keeps them, which is faster and no longer exact.
        max_running: sequences that are sampled at the same time; the others wait.
        seed: of the engine's own random numbers; those of torch are left alone. Two runs sample
            the same tokens only if their requests also meet in the same batches.

    Raises:
        DataError: `model` is no causal language model, or says neither when to end nor how long
            its context is.
        ConfigError: the model cannot take weights under the names of its checkpoint, or this run
            has several ranks.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        kv: Literal["recompute", "reuse"] = "recompute",
        max_running: int = 64,
        seed: int = 0,
    ) -> None:
        _check_settings(kv, max_running)
        self.version = -1
        self._name = model
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = _load_model(model, dtype).to(self._device)  # type: ignore[arg-type]
        self._end_token_ids = _end_token_ids(self._model)
        self.max_model_len = _max_model_len(self._model)
        """Prompt and response together may have this many tokens."""
        self._kv = kv
        self._max_running = max_running
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._turn = threading.Condition()  # guards all below; held for moments, never for a step
        self._waiting = deque[_Sequence]()
        self._batches = deque[_Batch]()
        self._is_sampling = self._is_paused = self._is_loading = False
        self._ending: ServerError | None = None  # why the thread ends or has ended
        self._thread = threading.Thread(target=self._run, name="arealite-hf", daemon=True)
        self._thread.start()
        # Python kills the thread when it ends, and inside of torch that aborts the process.
        atexit.register(self.close)

    @property
    def room(self) -> int:
        """Requests more that would be sampled at once, rather than wait."""
        with self._turn:
            return self._max_running - self._num_running() - len(self._waiting)

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        """Sample one response; cancelling the task that awaits it drops it from its batch.

        The behavior log-probs are those of the distribution that was sampled from: the logits
        divided by the temperature, and with top_p the nucleus alone. At temperature 0 they are
        those at temperature 1, as vLLM's are.

        Raises:
            PromptTooLongError: the context has no room for one more token.
            ServerError: the prompt is empty or not of this vocabulary, the engine was closed, or
                a step failed.
            TrajectoryError: the model's logits are not numbers.
        """
        prompt = list(request.token_ids)
        sequence = _Sequence(request=request, context=prompt, room=self._room(prompt))
        with self._turn:
            if self._ending is not None:
                raise ServerError(f"{self._ending} Make a new one.") from self._ending
            self._waiting.append(sequence)
            self._turn.notify_all()
        with waiting("a reply of HFEngine", alarm_after_s=math.inf):
            return await asyncio.wrap_future(sequence.outcome)

    def pause(self) -> None:
        """Freeze running requests between two tokens; new ones queue."""
        with self._turn:
            self._is_paused = True
            self._turn.wait_for(lambda: not self._is_sampling)

    def resume(self) -> None:
        """Let the requests go on."""
        with self._turn:
            self._is_paused = False
            self._turn.notify_all()

    def sleep(self) -> None:
        """Nothing: the model keeps its memory, beside that of the trainer."""

    def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Copy full tensors, under their Hugging Face names, between two tokens.

        All are held and compared with the model before the first is copied.

        Raises:
            ServerError: a name or shape that the model does not have, or a tensor that is missing;
                the weights and their version stay as they were.
        """
        pairs = _matched(self._model, weights)
        with self._turn:
            self._is_loading = True
            self._turn.wait_for(lambda: not self._is_sampling)
        try:
            with torch.no_grad():
                for target, received in pairs:
                    target.copy_(received)
            if self._kv == "recompute":
                for batch in self._batches:
                    batch.forget_cache()
            self.version = version
        finally:
            with self._turn:
                self._is_loading = False
                self._turn.notify_all()

    def close(self) -> None:
        """End the thread; requests that still run or wait get a ServerError."""
        atexit.unregister(self.close)
        with self._turn:
            self._ending = self._ending or ServerError("HFEngine was closed.")
            self._turn.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _room(self, prompt: list[int]) -> int:
        """Number of tokens that fit behind the prompt."""
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"A prompt of {len(prompt)} tokens leaves no room in a context of "
                f"{self.max_model_len}. Filter out long rows, or take a model with a longer "
                "context."
            )
        vocab_size = self._model.config.get_text_config().vocab_size
        if not prompt or not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ServerError(
                f"A prompt of {len(prompt)} tokens is empty or has ids outside of 0 to "
                f"{vocab_size - 1}. Use the tokenizer that belongs to the model."
            )
        return room

    def _run(self) -> None:
        """The work of the thread: whatever ends it, nobody is left waiting."""
        try:
            with torch.inference_mode():
                while (batch := self._next_batch()) is not None:
                    self._step(batch)
        except BaseException as error:
            self._ending = _described("The thread of HFEngine", error)
        finally:
            with self._turn:
                self._is_sampling = False
                unfinished = [*self._waiting, *(s for b in self._batches for s in b.sequences)]
                self._turn.notify_all()
            assert self._ending is not None
            for sequence in unfinished:
                sequence.fail(self._ending)

    def _next_batch(self) -> "_Batch | None":
        """The batch whose turn it is, once there is one and nobody wants the model to rest."""
        with self._turn:
            self._is_sampling = False
            self._turn.notify_all()
            self._turn.wait_for(self._may_go_on)
            if self._ending is not None:
                return None
            self._is_sampling = True
            self._admit()
            self._batches.rotate(-1)
            return self._batches[-1]

    def _may_go_on(self) -> bool:
        if self._ending is not None:
            return True
        has_work = bool(self._waiting or self._batches)
        return has_work and not self._is_paused and not self._is_loading

    def _num_running(self) -> int:
        """Sequences without an answer; an answered one is about to leave its batch."""
        return sum(not s.outcome.done() for batch in self._batches for s in batch.sequences)

    def _admit(self) -> None:
        """Make a batch of the requests that wait, as far as `max_running` allows."""
        count = min(len(self._waiting), self._max_running - self._num_running())
        if count:
            arrivals = [self._waiting.popleft() for _ in range(count)]
            self._batches.appendleft(_Batch(arrivals, self._device))
        if len(self._batches) > MAX_BATCHES:
            smallest, other = sorted(self._batches, key=lambda batch: len(batch.sequences))[:2]
            other.join(smallest)
            self._batches.remove(smallest)

    def _step(self, batch: "_Batch") -> None:
        """Sample a token for each sequence of the batch; those that end leave it."""
        try:
            batch.drop_done()  # those that were cancelled
            if batch.sequences:
                batch.sample(self._model, self._generator, self.version)
                for sequence in batch.sequences:
                    if (reason := self._finish_reason(sequence)) is not None:
                        sequence.answer(reason)
                batch.drop_done()
        except Exception as error:
            if not isinstance(error, ArealiteError):
                error = _described("A step of HFEngine", error)
            for sequence in batch.sequences:
                sequence.fail(error)
            batch.sequences = []
        if not batch.sequences:
            with self._turn:
                self._batches.remove(batch)

    def _finish_reason(self, sequence: "_Sequence") -> FinishReason | None:
        """Why the last token is the last; None if it is not."""
        length = len(sequence.versions)
        if sequence.context[-1] in self._end_token_ids or self._has_stop_text(sequence):
            return "stop"
        if length == sequence.sampling.max_new_tokens:
            return "length"
        return "context" if length == sequence.room else None

    def _has_stop_text(self, sequence: "_Sequence") -> bool:
        """Whether one of its stop texts has just been completed."""
        stop = sequence.sampling.stop
        if not stop:
            return False
        reach = 4 * max(map(len, stop))  # a character is at most four tokens of a byte each
        latest = str(self._tokenizer.decode(sequence.sampled[-reach:], skip_special_tokens=True))
        return any(text in latest for text in stop)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._name)  # only who sets stop texts needs it


@dataclass(kw_only=True, slots=True, eq=False)
class _Sequence:
    """One request, and what has been sampled for it so far."""

    request: ModelRequest
    context: list[int]  # the prompt, and behind it the L tokens that were sampled
    room: int  # tokens that the model's context has behind the prompt
    outcome: Future[ModelResponse] = field(default_factory=Future)
    behavior_logprobs: list[float] = field(default_factory=list)  # [L]
    versions: list[int] = field(default_factory=list)  # [L]

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def sampled(self) -> list[int]:
        return self.context[len(self.context) - len(self.versions) :]

    def answer(self, finish_reason: FinishReason) -> None:
        """Give the response to whoever still awaits it."""
        if self.outcome.set_running_or_notify_cancel():
            self.outcome.set_result(
                ModelResponse(
                    token_ids=self.sampled,
                    behavior_logprobs=self.behavior_logprobs,
                    versions=self.versions,
                    finish_reason=finish_reason,
                    request=self.request,
                )
            )

    def fail(self, error: Exception) -> None:
        """Give the error instead, unless there is an answer already."""
        if not self.outcome.done() and self.outcome.set_running_or_notify_cancel():
            self.outcome.set_exception(error)


class _Batch:
    """Sequences that step together, padded on the left to the width of the longest.

    Example: contexts of 2 and 4 tokens before a step and after it; a sequence that ends leaves
    its row, and the width stays.

        .  .  a  b         .  .  a  b  x
        c  d  e  f         c  d  e  f  y
    """

    def __init__(self, sequences: list[_Sequence], device: torch.device) -> None:
        self.sequences = sequences
        self._device = device
        self.forget_cache()

    def forget_cache(self) -> None:
        """Make all keys and values anew in the next step."""
        self._cache: Any = None  # transformers' Cache
        self._width = 0

    def drop_done(self) -> None:
        """Drop the sequences that have their answer, or whose request was cancelled."""
        indices = [i for i, each in enumerate(self.sequences) if not each.outcome.done()]
        if len(indices) == len(self.sequences):
            return
        self.sequences = [self.sequences[i] for i in indices]
        if self._cache is not None and indices:
            self._cache.reorder_cache(torch.tensor(indices, device=self._device))

    def join(self, other: "_Batch") -> None:
        """Take the sequences of another batch; the keys and values of both are made anew."""
        self.sequences += other.sequences
        self.forget_cache()

    def sample(self, model: PreTrainedModel, generator: torch.Generator, version: int) -> None:
        """Append a token to each sequence, with its log-prob and the version of the weights."""
        settings = [sequence.sampling for sequence in self.sequences]
        tokens, logprobs = sample(
            self._next_logits(model),
            torch.tensor([each.temperature for each in settings], device=self._device),
            torch.tensor([each.top_p for each in settings], device=self._device),
            generator,
        )
        sampled = zip(self.sequences, tokens.tolist(), logprobs.tolist(), strict=True)
        for sequence, token, logprob in sampled:
            sequence.context.append(token)
            sequence.behavior_logprobs.append(logprob)
            sequence.versions.append(version)

    def _next_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Logits [N, V] float32 of the next tokens; the cache then holds all tokens so far."""
        contexts = [sequence.context for sequence in self.sequences]
        if self._cache is None:
            self._width = max(map(len, contexts))
            inputs = [[0] * (self._width - len(context)) + context for context in contexts]
        else:
            self._width += 1
            inputs = [context[-1:] for context in contexts]
        starts = torch.tensor([self._width - len(context) for context in contexts])
        positions = (torch.arange(self._width) - starts[:, None]).to(self._device)  # [N, W]
        output = model(
            input_ids=torch.tensor(inputs, device=self._device),
            attention_mask=(positions >= 0).long(),
            position_ids=positions[:, -len(inputs[0]) :].clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1].float()


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row [N], and its log-prob [N] in the distribution it was drawn from.

    Args:
        logits: [N, V] float32.
        temperature: [N] divides the logits. 0 takes the most likely token and reports its
            log-prob at temperature 1, whatever top_p is.
        top_p: [N] mass of the most likely tokens that are drawn from.
    """
    is_greedy = temperature == 0
    logprobs = (logits / temperature.masked_fill(is_greedy, 1.0)[:, None]).log_softmax(-1)
    if logprobs.isnan().any():
        raise TrajectoryError(
            "The model's logits are not numbers: its weights may hold nan. Look at the training "
            "step that made them."
        )
    logprobs = _nucleus(logprobs, top_p.masked_fill(is_greedy, 1.0))
    drawn = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    tokens = torch.where(is_greedy, logprobs.argmax(-1), drawn)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _nucleus(logprobs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Log-probs [N, V] of the smallest sets that hold `top_p`, -inf outside of them."""
    is_cut = top_p < 1  # rows that are not stay as they are: their cumsum may pass 1 by rounding
    if not is_cut.any():
        return logprobs
    probs, order = logprobs.exp().sort(descending=True)
    is_outside = (probs.cumsum(-1) - probs >= top_p[:, None]) & is_cut[:, None]
    is_outside = torch.zeros_like(is_outside).scatter(1, order, is_outside)
    return logprobs.masked_fill(is_outside, -torch.inf).log_softmax(-1)


def _described(what: str, error: BaseException) -> ServerError:
    failure = ServerError(
        f"{what} failed with {error!r}. If memory has run out, lower max_running."
    )
    failure.__cause__ = error
    return failure


def _matched(
    model: PreTrainedModel, weights: Iterable[tuple[str, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The model's own tensors, each with the one that was received for it."""
    own = model.state_dict()
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, received in weights:
        target = own.get(name)
        if target is None or target.shape != received.shape:
            shape = "no such tensor" if target is None else f"{list(target.shape)} there"
            raise ServerError(
                f"The weights have {name} of shape {list(received.shape)}, but HFEngine's model "
                f"has {shape}. Give both engines the same model."
            )
        pairs.append((target, received))
    # By memory, not by name: a tied head is the embedding under a second name.
    filled = {target.data_ptr() for target, _ in pairs}
    missing = [name for name, target in own.items() if target.data_ptr() not in filled]
    if missing:
        raise ServerError(
            f"The weights lack {len(missing)} of {len(own)} tensors, such as {missing[0]}. Push "
            "all of them each time."
        )
    return pairs


def _check_settings(kv: str, max_running: int) -> None:
    if kv not in ("recompute", "reuse"):
        raise ConfigError(f'HFEngine: kv={kv!r} must be "recompute" or "reuse".')
    if max_running < 1:
        raise ConfigError(f"HFEngine: max_running={max_running} must be at least 1.")
    if dist.world_size() > 1:
        raise ConfigError(
            f"HFEngine takes weights from its own process only, and this run has "
            f"{dist.world_size()} ranks, of which rank 0 pushes. Use one rank, or VLLMEngine."
        )


def _load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    path = resolve_model(name)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name!r} could not be loaded as a causal language model: {error}. "
            "Give a Hugging Face id, or a folder with config.json and *.safetensors."
        ) from error
    if getattr(model, "_weight_conversions", None):
        raise ConfigError(
            f"{type(model).__name__} keeps some weights under other names than its checkpoint, as "
            "mixtures of experts do, so HFEngine cannot take new ones. Serve it with vLLM."
        )
    return model.eval().requires_grad_(False)


def _end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Every id that the model's two configurations name as an end token."""
    found: set[int] = set()
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if not found:
        raise DataError(
            f"{model.name_or_path} has no end token, so no answer could ever end. Set "
            "`eos_token_id` in its config.json."
        )
    return frozenset(found)


def _max_model_len(model: PreTrainedModel) -> int:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise DataError(
            f"{model.name_or_path} does not say how long its context is. Set "
            "`max_position_embeddings` in its config.json."
        )
    return int(length)
