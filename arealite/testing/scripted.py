"""An engine without a model: it says what the test tells it to, as fast as the test wants."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from arealite.errors import PromptTooLongError, TrajectoryError
from arealite.testing.models import byte_tokenizer
from arealite.types import FinishReason, ModelRequest, ModelResponse


class ScriptedEngine:
    """`InferenceEngine` for testing a workflow in milliseconds.

    Example:
        engine = ScriptedEngine(replies=["<calc>48 / 2</calc>", "#### 24"])
        group = await agent.arun_episode(engine, row)     # every conversation gets both, in turn

    Pausing, new weights and requests from several threads and event loops work as with a real
    engine: a token that is not sampled yet waits for `resume`, and is then of the new version.

    Args:
        replies: what the model says in turn 1, 2, ... of each conversation; or a function of the
            whole conversation as text.
        tokenizer: the one of the workflow; `arealite.testing.byte_tokenizer()` by default.
        seconds_per_token: what each token takes on the event loop; under `run_with_virtual_clock`
            it costs no real time.
        max_model_len: prompt and response together may have this many tokens.
    """

    def __init__(
        self,
        replies: Sequence[str] | Callable[[str], str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        seconds_per_token: float = 0.0,
        max_model_len: int = 32768,
    ) -> None:
        self.version = 0
        self.max_model_len = max_model_len
        self.requests: list[ModelRequest] = []
        self._replies = replies
        self._tokenizer = tokenizer or byte_tokenizer()
        self._seconds_per_token = seconds_per_token
        self._lock = threading.Lock()  # over what follows, and over the version
        self._turns: dict[tuple[int, ...], int] = {}  # conversation so far -> turns taken
        self._is_paused = False
        self._frozen: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def room(self) -> None:
        """Any number of requests is worked on at once."""

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        """The next reply of this conversation, ended by the end token, each at log-prob -0.5.

        Raises:
            PromptTooLongError: the context has no room for one more token.
            TrajectoryError: the script has no reply for this turn.
        """
        room = self.max_model_len - len(request.token_ids)
        if room < 1:
            raise PromptTooLongError(
                f"A prompt of {len(request.token_ids)} tokens leaves no room in a context of "
                f"{self.max_model_len}. Filter out long rows, or raise max_model_len of the "
                "ScriptedEngine."
            )
        self.requests.append(request)
        reply = self._encode(self._reply(request.token_ids), request.sampling.stop)
        token_ids = reply[: min(request.sampling.max_new_tokens, room)]
        finish_reason: FinishReason = "stop"
        if len(token_ids) < len(reply):
            finish_reason = "length" if request.sampling.max_new_tokens <= room else "context"
        return ModelResponse(
            token_ids=token_ids,
            behavior_logprobs=[-0.5] * len(token_ids),
            versions=[await self._sample_token() for _ in token_ids],
            finish_reason=finish_reason,
            request=request,
        )

    def pause(self) -> None:
        """Freeze running requests between two tokens; new ones queue."""
        with self._lock:
            self._is_paused = True

    def resume(self) -> None:
        """Let the requests go on."""
        with self._lock:
            self._is_paused = False
            frozen, self._frozen = self._frozen, []
        for loop, resumed in frozen:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has stopped waiting
                loop.call_soon_threadsafe(resumed.set)

    def sleep(self) -> None: ...

    def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Take the version; the weights change nothing here."""
        for _ in weights:
            pass
        with self._lock:
            self.version = version

    def close(self) -> None: ...

    async def _sample_token(self) -> int:
        """Version of the weights that sample a token, once it has taken its time."""
        if self._seconds_per_token:
            await asyncio.sleep(self._seconds_per_token)
        while True:
            with self._lock:
                if not self._is_paused:
                    return self.version
                resumed = asyncio.Event()
                self._frozen.append((asyncio.get_running_loop(), resumed))
            await resumed.wait()

    def _encode(self, text: str, stop: tuple[str, ...]) -> list[int]:
        ends = [text.index(end) + len(end) for end in stop if end in text]
        text = text[: min(ends, default=None)]
        token_ids = list(self._tokenizer.encode(text, add_special_tokens=False))
        if ends:
            return token_ids
        return [*token_ids, int(self._tokenizer.eos_token_id)]  # type: ignore[arg-type]

    def _reply(self, conversation: list[int]) -> str:
        if callable(self._replies):
            return self._replies(str(self._tokenizer.decode(conversation)))
        turn = self._turn(conversation)
        if turn >= len(self._replies):
            raise TrajectoryError(
                f"The script has {len(self._replies)} replies, but turn {turn + 1} was asked for. "
                "Add a reply, or end the episode earlier."
            )
        return self._replies[turn]

    def _turn(self, conversation: list[int]) -> int:
        """Turns this conversation has had: those of its longest beginning that asked before."""
        with self._lock:
            beginnings = (
                turns
                for asked, turns in self._turns.items()
                if len(asked) < len(conversation) and tuple(conversation[: len(asked)]) == asked
            )
            turn = max(beginnings, default=0)
            self._turns[tuple(conversation)] = turn + 1
        return turn
