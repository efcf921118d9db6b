"""A conversation as a ledger of tokens: what the policy sampled stays exactly as it was sampled.

    messages -> chat template -> ids   [masked]
    ModelResponse.token_ids            [trained on]
    new message -> rendered alone -> ids   [masked]
    ...

Nothing the model produced is ever tokenized again.
"""

import inspect
import itertools

from transformers import PreTrainedTokenizerBase

from arealite.errors import DataError, TrajectoryError
from arealite.rewards.pool import RewardFn, score
from arealite.types import ModelRequest, ModelResponse, Row, SamplingParams, Trajectory

Message = dict[str, str]

# A message that no template rewrites, to find out what a template puts behind an answer.
_PROBE = "arealite-probe"

_next_conversation = itertools.count()


class Transcript:
    """One conversation, from its first messages to a finished `Trajectory`.

    Args:
        reward_timeout_s: limit of the reward in seconds; None: that of the pool, 15.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[Message],
        *,
        reward_timeout_s: float | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._reward_timeout_s = reward_timeout_s
        self._conversation = next(_next_conversation)
        self._reply: ModelResponse | None = None
        self._temperature: float | None = None
        text = _render(tokenizer, messages)
        self._token_ids: list[int] = _encode(tokenizer, text)
        _check_readable(tokenizer, text, self._token_ids)
        self._loss_mask = [False] * len(self._token_ids)
        self._behavior_logprobs = [0.0] * len(self._token_ids)
        self._versions = [-1] * len(self._token_ids)

    @property
    def last_text(self) -> str:
        """The last response as text, without special tokens; empty before the first."""
        if self._reply is None:
            return ""
        return str(self._tokenizer.decode(self._reply.token_ids, skip_special_tokens=True))

    def request(self, sampling: SamplingParams) -> ModelRequest:
        """The whole conversation so far, as the next thing to ask the engine."""
        if self._temperature not in (None, sampling.temperature):
            raise TrajectoryError(
                f"One conversation was sampled at temperature {self._temperature} and then at "
                f"{sampling.temperature}; the trainer applies one per trajectory."
            )
        self._temperature = sampling.temperature
        return ModelRequest(
            token_ids=list(self._token_ids), sampling=sampling, conversation=self._conversation
        )

    def add_response(self, response: ModelResponse) -> None:
        """Append what the policy sampled; these are the tokens to train on."""
        if inspect.isawaitable(response):
            raise TrajectoryError(
                "add_response got a coroutine. Put `await` before engine.agenerate(...)."
            )
        length = len(response.token_ids)
        if not length == len(response.behavior_logprobs) == len(response.versions):
            raise TrajectoryError(
                f"A response has {length} tokens, {len(response.behavior_logprobs)} log-probs and "
                f"{len(response.versions)} versions. An InferenceEngine returns one of each."
            )
        self._reply = response
        self._token_ids += response.token_ids
        self._loss_mask += [True] * length
        self._behavior_logprobs += response.behavior_logprobs
        self._versions += response.versions

    def add_message(self, role: str, content: str) -> None:
        """Append a message that the policy did not write, such as a tool's result.

        Raises:
            TrajectoryError: the chat template rewrites earlier messages when one is added, so
                that the tokens sampled so far cannot be kept.
        """
        if self._reply is None:
            raise TrajectoryError("add_message comes after a response; start with all messages.")
        suffix = _encode(self._tokenizer, self._suffix({"role": role, "content": content}))
        # A response that ended by itself already holds the end token that the suffix begins with.
        if self._reply.token_ids and suffix[:1] == self._reply.token_ids[-1:]:
            suffix = suffix[1:]
        self._token_ids += suffix
        self._loss_mask += [False] * len(suffix)
        self._behavior_logprobs += [0.0] * len(suffix)
        self._versions += [-1] * len(suffix)

    async def finish(self, reward: RewardFn, row: Row) -> Trajectory:
        """The trajectory, with the reward of the last response.

        Args:
            reward: a `def` runs in a worker process that can be killed; an `async def` on this
                loop, with a deadline.

        Raises:
            RewardError: it gave no number.
        """
        if self._reply is None or self._temperature is None:
            raise TrajectoryError("finish comes after at least one request and its response.")
        value = await score(reward, self.last_text, row, timeout_s=self._reward_timeout_s)
        return Trajectory(
            token_ids=self._token_ids,
            loss_mask=self._loss_mask,
            behavior_logprobs=self._behavior_logprobs,
            versions=self._versions,
            reward=value,
            temperature=self._temperature,
            finish_reason=self._reply.finish_reason,
        )

    def _suffix(self, message: Message) -> str:
        """What the template puts between the text of an answer and that of the next one."""
        before: list[Message] = [
            {"role": "user", "content": _PROBE},
            {"role": "assistant", "content": _PROBE},
        ]
        earlier = _render(self._tokenizer, before, is_open=False)
        text = _render(self._tokenizer, [*before, message])
        if not text.startswith(earlier):
            raise TrajectoryError(
                f"The chat template of {self._tokenizer.name_or_path} changes earlier messages "
                "when one is added, so a conversation cannot be continued token for token. Use "
                "one request per trajectory, or a template that only appends."
            )
        return text[earlier.rindex(_PROBE) + len(_PROBE) :]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, is_open: bool = True
) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    )


def _check_readable(tokenizer: PreTrainedTokenizerBase, text: str, token_ids: list[int]) -> None:
    """Raise DataError if more than a quarter of the words is not in the tokens.

    A small vocabulary drops what it has no token for, or makes it unknown, and says nothing.
    """
    kept = "".join(str(tokenizer.decode(token_ids)).split()).casefold()
    words = text.split()
    dropped = [word for word in words if word.casefold() not in kept]
    if len(dropped) > len(words) / 4:
        raise DataError(
            f"The tokenizer drops {len(dropped)} of the {len(words)} words of a prompt, such as "
            f"{', '.join(map(repr, dropped[:3]))}: its model cannot read these rows. Set `model` "
            "to one that can, or `dataset` to rows that it was made for."
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has already written every special token.
    return list(tokenizer.encode(text, add_special_tokens=False))
