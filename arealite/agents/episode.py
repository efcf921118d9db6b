"""One episode of an agent: its calls as branches of conversations, each an exact ledger of tokens.

call 1  [user]                         -> answer a       branch a
call 2  [user, a, tool result]         -> answer b       continues a: the same ledger
call 3  [user, a, another result]      -> answer c       a again: a ledger of its own, in which
                                                         what a sampled is context
call 4  [user, a edited, tool result]  -> answer d       knows no answer: rendered anew
"""

import asyncio
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from arealite.agents.replies import Choice, Completion
from arealite.agents.requests import ChatCall, RequestError
from arealite.api import InferenceEngine
from arealite.errors import DataError, PromptTooLongError, TrajectoryError, first_cause
from arealite.rollout.chat_template import ChatTemplate, Message
from arealite.rollout.tools import CallFormat, parse_answer
from arealite.rollout.transcript import Transcript
from arealite.types import ModelResponse, SamplingParams, Trajectory


@dataclass(eq=False, slots=True, kw_only=True)
class _Branch:
    """A conversation up to an answer, from which it may go on in several ways."""

    call: ChatCall
    completion_id: str
    chat: Transcript
    parent: "_Branch | None"  # whose sampled tokens are among its own
    carrier: "_Branch | None" = None  # the branch that has its sampled tokens among its own
    messages: list[Message] = field(default_factory=list)  # as the agent knows them, the answer too
    response: ModelResponse | None = None
    reward: float | None = None  # of this answer alone

    @property
    def answer(self) -> Message:
        return self.messages[-1]

    def is_continued_by(self, call: ChatCall) -> bool:
        return (
            len(self.messages) < len(call.messages)
            and self.call.tools == call.tools
            and self.call.template_kwargs == call.template_kwargs
            and all(map(_is_same, self.messages, call.messages))
        )

    def release(self) -> None:
        """Let another carry the tokens of the parent; this one comes to nothing."""
        if self.parent is not None:
            self.parent.carrier = None


class Episode:
    """What an agent is given: where to send its calls, and a way to say how it went.

    Args:
        sampling: of the run; a call may ask for fewer tokens and for stop texts.
        base_url: of OpenAI clients.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingParams,
        *,
        base_url: str = "",
        call_format: CallFormat = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.base_url = base_url
        self.api_key = f"sk-{secrets.token_urlsafe(24)}"
        self.failure: Exception | None = None
        """What the engine failed with at the latest call; None if that was answered."""
        self.without_effect: set[str] = set()
        """Settings of the agent's calls that the run decides."""
        self.is_full = False
        """Whether the latest call was refused because its conversation fills the context."""
        self.reward: float | None = None
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._call_format: CallFormat = call_format
        self._template_kwargs = chat_template_kwargs or {}
        self._branches: list[_Branch] = []
        self._sampling_tasks: set[asyncio.Task[None]] = set()
        self._has_ended = False

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which OpenAI clients in other processes find this episode."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key}

    @property
    def last_text(self) -> str:
        """Text of the latest answer; empty before the first."""
        return str(self._branches[-1].answer["content"]) if self._branches else ""

    @property
    def step_rewards(self) -> list[float]:
        """What was told of single answers."""
        return [branch.reward for branch in self._branches if branch.reward is not None]

    @property
    def has_answers(self) -> bool:
        """Whether anything was sampled."""
        return bool(self._branches)

    def set_reward(self, reward: float, *, completion_id: str | None = None) -> None:
        """Say how good the episode was, or one of its answers; the latest word counts.

        Args:
            completion_id: `id` of the completion whose answers get this as the reward of a step.
        """
        if completion_id is None:
            self.reward = float(reward)
            return
        found = [branch for branch in self._branches if branch.completion_id == completion_id]
        if not found:
            raise RequestError(f"There is no completion {completion_id}.", param="completion_id")
        for branch in found:
            branch.reward = float(reward)

    async def complete(self, call: ChatCall) -> Completion:
        """Answer a call; every answer becomes a branch.

        Raises:
            RequestError: the conversation is too long, the template refuses it, the engine failed,
                or the episode is over.
        """
        self.without_effect |= set(call.without_effect)
        branches = self._begin(call)
        try:
            await self._sample(branches)
        except BaseException:
            for branch in branches:
                branch.release()
            raise
        self._branches += branches
        self.failure, self.is_full = None, False
        first = branches[0]
        assert first.response is not None
        return Completion(
            id=first.completion_id,
            call=call,
            choices=[self._choice(branch) for branch in branches],
            num_prompt_tokens=len(first.chat.token_ids) - len(first.response.token_ids),
        )

    def forget(self, completion: Completion) -> None:
        """Take back a completion that never reached the agent: nothing can follow from it."""
        for branch in [b for b in self._branches if b.completion_id == completion.id]:
            if branch.carrier is None:  # another completion may have said the same
                self._branches.remove(branch)
                branch.release()

    def end(self) -> None:
        """Give up the calls that still run, and refuse others."""
        self._has_ended = True
        for task in self._sampling_tasks:
            task.cancel()

    async def trajectories(
        self, reward: float, *, raw_reward: float | None = None
    ) -> list[Trajectory]:
        """All that was sampled, each token once; the last one has the metrics of the episode."""
        for branch in self._branches:
            if branch.reward is not None:
                leaf = self._leaf(branch)
                leaf.chat.add_step_reward(branch.reward, response=branch.response)
        leaves = [branch for branch in self._branches if self._leaf(branch) is branch]
        finished = [await leaf.chat.finish(reward, raw_reward=raw_reward) for leaf in leaves]
        parts = [part for last in finished for part in (*last.earlier, replace(last, earlier=()))]
        parts = [part for part in parts if any(part.loss_mask)] or parts  # an answer may be empty
        metrics = {
            "turns": float(len(self._branches)),
            "tool_calls": float(sum(len(b.answer.get("tool_calls", [])) for b in self._branches)),
            "forks": float(len(parts) - 1),
        }
        plain = [replace(part, metrics={}) for part in parts]
        reason = "context" if self.is_full else plain[-1].finish_reason
        return [*plain[:-1], replace(plain[-1], metrics=metrics, finish_reason=reason)]

    def _leaf(self, branch: _Branch) -> _Branch:
        """The last of the branches that have this one's sampled tokens among their own."""
        while branch.carrier in self._branches:  # others still run, or came to nothing
            branch = branch.carrier
        return branch

    def _begin(self, call: ChatCall) -> list[_Branch]:
        """A branch for each answer that the call wants."""
        if self._has_ended:
            raise RequestError("The episode of this key is over.", status=401, code="ended")
        try:
            chat, parent = self._conversation(call)
        except (TrajectoryError, DataError) as error:
            raise RequestError(str(error), param="messages") from error
        completion_id = f"chatcmpl-{secrets.token_hex(12)}"
        chats = [chat, *(chat.branch(is_trained=False) for _ in range(call.num_choices - 1))]
        branches = [
            _Branch(call=call, completion_id=completion_id, chat=each, parent=None)
            for each in chats
        ]
        if parent is not None:
            branches[0].parent, parent.carrier = parent, branches[0]
        return branches

    def _conversation(self, call: ChatCall) -> tuple[Transcript, _Branch | None]:
        """What the call continues, and the branch whose tokens are then among its own, if any."""
        longest_first = sorted(
            self._branches, key=lambda b: (len(b.messages), b.carrier is None), reverse=True
        )
        longest = next((branch for branch in longest_first if branch.is_continued_by(call)), None)
        if longest is None:
            kwargs = self._template_kwargs | call.template_kwargs
            template = ChatTemplate(self._tokenizer, tools=call.tools, kwargs=kwargs)
            return Transcript(template, call.messages), None
        parent = longest if longest.carrier is None else None
        chat = longest.chat.branch(is_trained=parent is not None)
        chat.add_messages(call.messages[len(longest.messages) :])
        return chat, parent

    async def _sample(self, branches: list[_Branch]) -> None:
        """Get an answer for each branch."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            async with asyncio.TaskGroup() as group:
                tasks |= {group.create_task(self._answer(branch)) for branch in branches}
                self._sampling_tasks |= tasks
        except BaseExceptionGroup as failures:
            raise self._refused(first_cause(failures)) from first_cause(failures)
        finally:
            self._sampling_tasks -= tasks
        if self._has_ended:
            raise RequestError("The episode of this key is over.", status=401, code="ended")

    async def _answer(self, branch: _Branch) -> None:
        call, most = branch.call, self._sampling.max_new_tokens
        sampling = replace(
            self._sampling,
            max_new_tokens=min(call.max_new_tokens or most, most),
            stop=call.stop or self._sampling.stop,
        )
        response = await self._engine.agenerate(branch.chat.request(sampling))
        text = branch.chat.text_of(response)
        told = _before(text, sampling.stop)
        answer = parse_answer(
            told,
            self._tokenizer,
            schemas=(call.tools or ()) if call.may_call_tools else (),
            call_format=self._call_format,
            prompt=branch.chat.prompt_text,
            num_calls=sum(len(message.get("tool_calls", [])) for message in call.messages),
        )
        if call.has_one_tool_call and "tool_calls" in answer:
            answer["tool_calls"] = answer["tool_calls"][:1]
        # The stop text is not in what the agent sees, but the policy did write it.
        is_whole = told == text or "tool_calls" in answer
        branch.chat.add_response(response, answer if is_whole else None)
        branch.messages, branch.response = [*call.messages, answer], response

    def _choice(self, branch: _Branch) -> Choice:
        response, decode = branch.response, self._tokenizer.decode
        assert response is not None
        shown = response.token_ids if branch.call.has_logprobs else []
        return Choice(
            message=branch.answer,
            finish_reason=response.finish_reason,
            num_tokens=len(response.token_ids),
            tokens=[str(decode([token_id])) for token_id in shown],
            logprobs=response.behavior_logprobs[: len(shown)],
            version=max(response.versions, default=self._engine.version),
        )

    def _refused(self, error: BaseException) -> RequestError:
        """What the engine failed with, as an error of the API."""
        if isinstance(error, PromptTooLongError):
            code, self.is_full = "context_length_exceeded", True
            return RequestError(str(error), param="messages", code=code)
        assert isinstance(error, Exception)
        self.failure = error
        return RequestError(f"{type(error).__name__}: {error}", status=500, code="engine_failed")


def _is_same(known: Message, told: Message) -> bool:
    """Whether it is a message of ours.

    Many a client does not send its thoughts back, or writes the arguments of calls anew.
    """
    if known == told:
        return True
    if "reasoning_content" not in told:
        known = {name: value for name, value in known.items() if name != "reasoning_content"}
    if known == told or "tool_calls" not in known or known.keys() != told.keys():
        return known == told
    return _with_values(known) == _with_values(told)


def _with_values(message: Message) -> Message:
    """The message with the arguments of its calls as values; a text that is no JSON stays one."""

    def value(call: dict[str, Any]) -> Any:
        try:
            return msgspec.json.decode(call["function"]["arguments"])
        except msgspec.DecodeError:
            return call["function"]["arguments"]

    calls = [(call["id"], call["function"]["name"], value(call)) for call in message["tool_calls"]]
    return message | {"tool_calls": calls}


def _before(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the first of these."""
    return text[: min((text.index(end) for end in stop if end in text), default=None)]
