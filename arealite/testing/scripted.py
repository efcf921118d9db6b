"""An engine without a model: it says what the test tells it to."""

from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from arealite.errors import TrajectoryError
from arealite.testing.models import byte_tokenizer
from arealite.types import ModelRequest, ModelResponse


class ScriptedEngine:
    """`InferenceEngine` for testing a workflow in milliseconds.

    Example:
        engine = ScriptedEngine(replies=["<calc>48 / 2</calc>", "#### 24"])
        group = await agent.arun_episode(engine, row)     # every conversation gets both, in turn

    Args:
        replies: what the model says in turn 1, 2, ... of each conversation; or a function of the
            whole conversation as text.
        tokenizer: the one of the workflow; `arealite.testing.byte_tokenizer()` by default.
    """

    def __init__(
        self,
        replies: Sequence[str] | Callable[[str], str],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.version = 0
        self.requests: list[ModelRequest] = []
        self._replies = replies
        self._tokenizer = tokenizer or byte_tokenizer()
        self._turns: dict[tuple[int, ...], int] = {}  # conversation so far -> turns taken

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        """The next reply of this conversation, ended by the end token, each at log-prob -0.5."""
        self.requests.append(request)
        token_ids = list(
            self._tokenizer.encode(self._reply(request.token_ids), add_special_tokens=False)
        )
        token_ids.append(int(self._tokenizer.eos_token_id))  # type: ignore[arg-type]
        budget = request.sampling.max_new_tokens
        is_cut, token_ids = len(token_ids) > budget, token_ids[:budget]
        return ModelResponse(
            token_ids=token_ids,
            behavior_logprobs=[-0.5] * len(token_ids),
            versions=[self.version] * len(token_ids),
            finish_reason="length" if is_cut else "stop",
        )

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Take the version; the weights change nothing here."""
        for _ in weights:
            pass
        self.version = version

    def close(self) -> None: ...

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
        beginnings = (
            turns
            for asked, turns in self._turns.items()
            if len(asked) < len(conversation) and tuple(conversation[: len(asked)]) == asked
        )
        turn = max(beginnings, default=0)
        self._turns[tuple(conversation)] = turn + 1
        return turn
