"""A conversation as a ledger of tokens: what the policy sampled stays exactly as it was sampled.

    messages -> chat template -> ids   [masked]
    ModelResponse.token_ids            [trained on]
    new message -> rendered alone -> ids   [masked]
    ...

Nothing the model produced is ever tokenized again. A template that rewrites what came before, as
some drop the thoughts of earlier turns, cannot be continued like that: then what was sampled so
far is kept as a trajectory of its own, and the conversation goes on in a new ledger, which begins
with the rewritten text.
"""

import inspect
import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace

from transformers import PreTrainedTokenizerBase

from arealite.errors import TrajectoryError
from arealite.rewards.pool import RewardFn, score
from arealite.rollout.chat_template import ChatTemplate, Message, check_readable
from arealite.types import ModelRequest, ModelResponse, Row, SamplingParams, Trajectory

_next_conversation = itertools.count()


class Transcript:
    """One conversation, from its first messages to a finished `Trajectory`.

    Args:
        template: how messages become tokens; a tokenizer stands for its template without tools.
        messages: what the conversation begins with, as in OpenAI's API.
        reward_timeout_s: limit of the reward in seconds; None: that of the pool, 15.
    """

    def __init__(
        self,
        template: ChatTemplate | PreTrainedTokenizerBase,
        messages: Sequence[Message],
        *,
        reward_timeout_s: float | None = None,
    ) -> None:
        is_template = isinstance(template, ChatTemplate)
        self._template = template if is_template else ChatTemplate(template)
        self._reward_timeout_s = reward_timeout_s
        self._conversation = self._thread = next(_next_conversation)
        self._messages, self._rendered = list(messages), list(messages)
        self.is_full = False
        """Whether the next request did not fit into the model's context; the trajectory says so."""
        self._open_request: ModelRequest | None = None
        self._decoded: tuple[ModelResponse | None, str] = (None, "")  # the latest
        self._earlier: list[_Ledger] = []
        self._forks: list[str] = []
        self._asked = self._template.render(messages)  # the text that the ledger was rendered from
        self._ledger = _Ledger()
        self._ledger.add_context(self._template.encode(self._asked))
        self._answered = self._ledger  # with the last response; another one if a fork follows it
        check_readable(self._template, self._asked, self._ledger.token_ids)

    @property
    def forks(self) -> list[str]:
        """Why a new ledger was begun, each time that one was."""
        return list(self._forks)

    @property
    def messages(self) -> list[Message]:
        """All messages so far, the policy's own included."""
        return list(self._messages)

    @property
    def token_ids(self) -> list[int]:
        """[L] the whole context so far, as the next request has it."""
        return list(self._ledger.token_ids)

    @property
    def last_text(self) -> str:
        """The last response as text, without special tokens; empty before the first."""
        reply = self._answered.reply
        return self.text_of(reply) if reply else ""

    @property
    def prompt_text(self) -> str:
        """The conversation as text up to where the next response begins."""
        return self._template.plain(self._asked)

    @property
    def num_turns(self) -> int:
        """Responses of the policy so far."""
        return sum(ledger.num_turns for ledger in (*self._earlier, self._answered))

    def text_of(self, response: ModelResponse) -> str:
        """A response as text, without special tokens."""
        known, text = self._decoded
        if response is not known:
            decode = self._template.tokenizer.decode
            text = str(decode(response.token_ids, skip_special_tokens=True))
            self._decoded = (response, text)
        return text

    def request(self, sampling: SamplingParams) -> ModelRequest:
        """The whole conversation so far, as the next thing to ask the engine."""
        temperature = self._ledger.temperature
        if temperature not in (None, sampling.temperature):
            raise TrajectoryError(
                f"One conversation was sampled at temperature {temperature} and then at "
                f"{sampling.temperature}; the trainer applies one per trajectory."
            )
        self._open_request = ModelRequest(
            token_ids=self.token_ids, sampling=sampling, conversation=self._conversation
        )
        return self._open_request

    def add_response(self, response: ModelResponse, message: Message | None = None) -> None:
        """Append what the policy sampled; these are the tokens to train on.

        Args:
            response: what the engine answered to the last `request`, and nothing else.
            message: how it reads, such as with its tool calls parsed; by default its text.

        Raises:
            TrajectoryError: it answers another request, or none, so that nobody knows whether the
                policy has sampled it here.
        """
        if inspect.isawaitable(response):
            raise TrajectoryError(
                "add_response got a coroutine. Put `await` before engine.agenerate(...)."
            )
        if not isinstance(response, ModelResponse):
            raise TrajectoryError(
                f"add_response got {response!r:.80}. It takes what engine.agenerate returns; "
                "ChatWorkflow.ask returns None once a conversation fills the model's context."
            )
        if self._open_request is None or response.request is not self._open_request:
            raise TrajectoryError(
                "add_response takes what engine.agenerate answered to the last request of this "
                "conversation, once. Whatever else there is to say goes to add_message."
            )
        self._ledger.add_response(response)
        if self._ledger is not self._answered:
            self._earlier.append(self._answered)
        self._answered = self._ledger
        self._open_request = None
        self.is_full = False
        text: Message = {"role": "assistant", "content": self.text_of(response)}
        self._messages.append(message or text)
        is_expressed = message is not None and self._template.expresses(message)
        self._rendered.append(message if is_expressed and message else text)
        self._answered.asked, self._answered.answer = self._asked, self._rendered[-1]

    def add_message(self, role: str, content: str) -> None:
        """Append a message that the policy did not write, such as a tool's result."""
        self.add_messages([{"role": role, "content": content}])

    def add_messages(self, messages: Sequence[Message]) -> None:
        """Append messages that the policy did not write, all together or one after the other.

        Raises:
            TrajectoryError: the template refuses them.
        """
        answered = self._answered
        if answered.reply is None:
            raise TrajectoryError("add_message comes after a response; start with all messages.")
        text = self._template.render([*self._rendered, *messages])
        end, reason = self._end_of_answer(text)
        if self._ledger is not answered:
            self._forks.pop()
        answered.cut_to_response()  # what was added behind it is in the text once more
        if reason:
            self._forks.append(reason)
            self._ledger = _Ledger()
            self._ledger.add_context(self._template.encode(text))
        else:
            answered.add_suffix(self._template.encode(text[end:]))
            self._ledger = answered
        self._asked = text
        self._open_request = None
        self._messages += messages
        self._rendered += messages

    def add_step_reward(
        self, reward: float, *, end: int | None = None, response: ModelResponse | None = None
    ) -> None:
        """Reward a step of a response, beside the reward of the whole; the latest word counts.

        Args:
            end: number of tokens of the response after which the step ends; None: all of them. In a
                branch that does not train on it, a step counts for nothing.
            response: which one; None: the last.
        """
        for ledger in (self._answered, *reversed(self._earlier)):
            for start, known in reversed(ledger.replies):
                if response is None or response is known:
                    ledger.add_step_reward(reward, start, known, end)
                    return
        raise TrajectoryError("A step reward is for a response of this conversation.")

    def branch(self, *, is_trained: bool) -> "Transcript":
        """A copy that goes on from here in its own way.

        Args:
            is_trained: keep what was sampled so far among the tokens to train on. Of several
                branches one does, so that each token is trained on once.
        """
        branch = copy(self)
        branch._open_request = None  # whose answer is for this conversation alone
        branch._thread = self._thread if is_trained else next(_next_conversation)
        branch._messages, branch._rendered = list(self._messages), list(self._rendered)
        branch._forks = self.forks if is_trained else []
        branch._earlier = [each.copy(is_trained=True) for each in self._earlier if is_trained]
        branch._answered = self._answered.copy(is_trained=is_trained)
        is_forked = self._ledger is not self._answered
        branch._ledger = self._ledger.copy(is_trained=True) if is_forked else branch._answered
        return branch

    async def finish(
        self,
        reward: RewardFn | float,
        row: Row | None = None,
        *,
        raw_reward: float | None = None,
        metrics: dict[str, float] | None = None,
    ) -> Trajectory:
        """The trajectory, with the reward of the last response.

        Args:
            reward: a number; or a function: a `def` runs in a worker process that can be killed,
                an `async def` on this loop, with a deadline.
            row: what the function is given beside the text.
            raw_reward: before any shaping, to be logged beside it; None: the same.
            metrics: of this episode, averaged into `rollout/NAME`; beside its own `turns`.

        Raises:
            RewardError: it gave no number.
        """
        if self._answered.reply is None:
            raise TrajectoryError("finish comes after at least one request and its response.")
        value = await self.score(reward, row or {}) if callable(reward) else float(reward)
        ledgers = [each for each in (*self._earlier, self._answered) if any(each.loss_mask)]
        *earlier, last = [
            ledger.trajectory(value, value if raw_reward is None else raw_reward)
            for ledger in ledgers or [self._answered]
        ]
        metrics = {"turns": float(self.num_turns)} | (metrics or {})
        reason = "context" if self.is_full else last.finish_reason
        last = replace(last, metrics=metrics, finish_reason=reason, thread=self._thread)
        return replace(last, earlier=tuple(replace(e, thread=self._thread) for e in earlier))

    async def score(self, reward: RewardFn, row: Row) -> float:
        """What the reward function says of the last response."""
        return await score(reward, self.last_text, row, timeout_s=self._reward_timeout_s)

    def _end_of_answer(self, text: str) -> tuple[int, str]:
        """Where the last answer ends in a rendering of the conversation that goes on behind it.

        Or, as the second value, why that rendering is not the ledger with something behind it.
        """
        asked, answer = self._answered.asked, self._answered.answer
        if not text.startswith(asked):
            return 0, "the template rewrites what was before the answer"
        end = self._template.end_of_answer(text, len(asked))
        if end < 0:
            return 0, "the template puts nothing behind an answer that tells where it ends"
        rendered = _squeezed(self._template.plain(text[len(asked) : end]))
        if calls := answer.get("tool_calls"):  # which a template spells in its own way
            names = [call["function"]["name"] for call in calls]
            parts = [answer.get("reasoning_content") or "", answer.get("content") or "", *names]
            is_same = all(_squeezed(part) in rendered for part in parts)
        else:
            is_same = rendered == _squeezed(self.last_text)
        return end, "" if is_same else "the template rewrites the answer"


@dataclass(kw_only=True, slots=True)
class _Ledger:
    """Tokens and what is known of each; L tokens so far."""

    token_ids: list[int] = field(default_factory=list)  # [L]
    loss_mask: list[bool] = field(default_factory=list)  # [L]
    behavior_logprobs: list[float] = field(default_factory=list)  # [L]
    versions: list[int] = field(default_factory=list)  # [L]
    step_rewards: dict[int, float] = field(default_factory=dict)  # by the last token of a step
    replies: list[tuple[int, ModelResponse]] = field(default_factory=list)  # where each begins
    num_turns: int = 0
    asked: str = ""  # text of all before the last response, as the template had rendered it
    answer: Message = field(default_factory=dict)  # the last response, as the template renders it

    @property
    def reply(self) -> ModelResponse | None:
        """The last response."""
        return self.replies[-1][1] if self.replies else None

    @property
    def temperature(self) -> float | None:
        """That the tokens were sampled at."""
        request = self.reply.request if self.reply else None
        return request.sampling.temperature if request else None

    def add_context(self, token_ids: Sequence[int]) -> None:
        """Append tokens that the policy did not sample."""
        self.token_ids += token_ids
        self._mask(len(token_ids))

    def add_response(self, response: ModelResponse) -> None:
        length = len(response.token_ids)
        if not length == len(response.behavior_logprobs) == len(response.versions):
            raise TrajectoryError(
                f"A response has {length} tokens, {len(response.behavior_logprobs)} log-probs and "
                f"{len(response.versions)} versions. An InferenceEngine returns one of each."
            )
        self.replies.append((len(self.token_ids), response))
        self.num_turns += 1
        self.token_ids += response.token_ids
        self.loss_mask += [True] * length
        self.behavior_logprobs += response.behavior_logprobs
        self.versions += response.versions

    def cut_to_response(self) -> None:
        """Take away what was added behind the last response."""
        start, response = self.replies[-1]
        end = start + len(response.token_ids)
        for values in (self.token_ids, self.loss_mask, self.behavior_logprobs, self.versions):
            del values[end:]

    def add_suffix(self, token_ids: Sequence[int]) -> None:
        """Append what stands between the text of an answer and that of the next one."""
        # A response that ended by itself already holds the end token that the suffix begins with.
        is_ended = bool(self.reply and self.reply.token_ids[-1:] == list(token_ids[:1]))
        self.add_context(token_ids[1:] if is_ended else token_ids)

    def add_step_reward(
        self, reward: float, start: int, response: ModelResponse, end: int | None
    ) -> None:
        length = len(response.token_ids)
        if not 1 <= (length if end is None else end) <= length:
            raise TrajectoryError(
                f"A step that ends after {end} tokens is not one of a response of {length} tokens."
            )
        self.step_rewards[start + (length if end is None else end) - 1] = float(reward)

    def copy(self, *, is_trained: bool) -> "_Ledger":
        """The same tokens; unless they are to be trained on, as context alone."""
        if is_trained:
            return _Ledger(**{each.name: copy(getattr(self, each.name)) for each in fields(self)})
        ledger = _Ledger(replies=list(self.replies), asked=self.asked, answer=self.answer)
        ledger.add_context(self.token_ids)
        return ledger

    def trajectory(self, reward: float, raw_reward: float) -> Trajectory:
        """All up to the end of the last response; what was added behind it teaches nothing."""
        assert self.reply is not None and self.temperature is not None
        end = self.replies[-1][0] + len(self.reply.token_ids)
        return Trajectory(
            token_ids=self.token_ids[:end],
            loss_mask=self.loss_mask[:end],
            behavior_logprobs=self.behavior_logprobs[:end],
            versions=self.versions[:end],
            reward=reward,
            raw_reward=raw_reward,
            step_rewards=tuple(
                (end, step)
                for end, step in sorted(self.step_rewards.items())
                if self.loss_mask[end]
            ),
            temperature=self.temperature,
            finish_reason=self.reply.finish_reason,
        )

    def _mask(self, length: int) -> None:
        self.loss_mask += [False] * length
        self.behavior_logprobs += [0.0] * length
        self.versions += [-1] * length


def _squeezed(text: str) -> str:
    return "".join(text.split())
