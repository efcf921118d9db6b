"""Workflows: how one row becomes a group of episodes. Subclass `ChatWorkflow` for an agent."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from arealite.api import InferenceEngine
from arealite.errors import ConfigError, PromptTooLongError, first_cause
from arealite.rewards.pool import RewardFn
from arealite.rollout.chat_template import ChatTemplate, Message
from arealite.rollout.tools import CallFormat, Tools, parse_answer
from arealite.rollout.transcript import Transcript, flattened
from arealite.types import Row, SamplingParams, Trajectory


class ChatWorkflow:
    """A group of independent conversations about one row; a child writes `arun_sample`.

    Example: an agent that may use a calculator.

        class CalculatorAgent(ChatWorkflow):
            async def arun_sample(self, engine, row):
                chat = self.start(row["question"])
                for _ in range(4):
                    chat.add_response(await engine.agenerate(chat.request(self.sampling)))
                    call = re.search(r"<calc>(.+?)</calc>", chat.last_text)
                    if call is None:
                        break
                    chat.add_message("user", f"<result>{calculate(call[1])}</result>")
                return await chat.finish(self.reward, row)

    Args:
        reward: text of the last response and row in, number out; see `Transcript.finish`.
        group_size: conversations per row; their mean reward is the baseline of each.
        system_prompt: first message of every conversation, if not empty.
        reward_timeout_s: limit of one call of the reward in seconds, beyond which the row is lost;
            None: that of the pool, 15.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reward: RewardFn,
        sampling: SamplingParams,
        *,
        group_size: int = 1,
        system_prompt: str = "",
        reward_timeout_s: float | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.reward = reward
        self.sampling = sampling
        self.group_size = group_size
        self.system_prompt = system_prompt
        self.reward_timeout_s = reward_timeout_s
        self.template = ChatTemplate(tokenizer, kwargs=chat_template_kwargs or {})

    async def arun_episode(self, engine: InferenceEngine, row: Row) -> list[Trajectory] | None:
        """All conversations of the group at the same time; the first failure ends them all."""
        samples: list[asyncio.Task[Trajectory]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.group_size):
                    samples.append(group.create_task(self.arun_sample(engine, row)))
        except BaseExceptionGroup as failures:
            cause = first_cause(failures)
            raise cause from cause.__cause__
        except asyncio.CancelledError:
            for sample in samples:
                sample.result()  # the same error, with the line of the agent that it came to
            raise
        return flattened([sample.result() for sample in samples])

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        """One conversation: what an agent overrides."""
        raise NotImplementedError(f"{type(self).__name__} must define arun_sample.")

    def start(self, question: str) -> Transcript:
        """A conversation that begins with this question."""
        messages: list[Message] = [{"role": "user", "content": question}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return Transcript(self.template, messages, reward_timeout_s=self.reward_timeout_s)


class SingleTurnWorkflow(ChatWorkflow):
    """One question, one answer."""

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        chat.add_response(await engine.agenerate(chat.request(self.sampling)))
        return await chat.finish(self.reward, row)


class MultiTurnWorkflow(ChatWorkflow):
    """Another try after feedback, until an answer is right.

    The reward of a conversation is that of its last answer, times `turn_discount` for each turn
    before; the raw reward is logged beside it, and that of turn k as `rollout/reward_turn_k`, over
    the conversations that came so far.

    Args:
        feedback: what an answer that is not right is told; a function of its text and the row, or
            always the same.
        max_turns: answers at most.
        turn_discount: applied once to the whole, and not to the reward of each turn.
        right_from: an answer is right whose reward is not below.
        rewards_turns: also give each turn its own reward, as `step_rewards`; see
            `algo.advantages.step_advantages`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reward: RewardFn,
        sampling: SamplingParams,
        *,
        feedback: str | Callable[[str, Row], str] = "That is not right. Try again.",
        max_turns: int = 2,
        turn_discount: float = 0.9,
        right_from: float = 1.0,
        rewards_turns: bool = False,
        group_size: int = 1,
        system_prompt: str = "",
        reward_timeout_s: float | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            reward,
            sampling,
            group_size=group_size,
            system_prompt=system_prompt,
            reward_timeout_s=reward_timeout_s,
            chat_template_kwargs=chat_template_kwargs,
        )
        check_turns(max_turns)
        self.feedback = feedback
        self.max_turns = max_turns
        self.turn_discount = turn_discount
        self.right_from = right_from
        self.rewards_turns = rewards_turns

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        rewards: list[float] = []
        while True:
            chat.add_response(await engine.agenerate(chat.request(self.sampling)))
            rewards.append(await chat.score(self.reward, row))
            if self.rewards_turns:
                chat.add_step_reward(rewards[-1])
            if rewards[-1] >= self.right_from or len(rewards) == self.max_turns:
                break
            chat.add_message("user", self._feedback(chat.last_text, row))
        return await chat.finish(
            rewards[-1] * self.turn_discount ** (len(rewards) - 1),
            raw_reward=rewards[-1],
            metrics={f"reward_turn_{turn}": each for turn, each in enumerate(rewards, start=1)},
        )

    def _feedback(self, text: str, row: Row) -> str:
        return self.feedback if isinstance(self.feedback, str) else self.feedback(text, row)


class ToolWorkflow(ChatWorkflow):
    """One question, and an answer that may take calls of tools.

    The calls of a response are made at the same time and their results put into the conversation,
    until a response calls nothing; it is the answer. A conversation that has no more turns, or no
    more room in the context, ends where it is. Logs `rollout/tool_calls` per conversation.

    Args:
        tools: functions with type hints and docstrings; see `Tools`.
        max_turns: responses at most.
        tool_timeout_s: limit of one call in seconds.
        call_format: how the model writes a call.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reward: RewardFn,
        sampling: SamplingParams,
        *,
        tools: Sequence[Callable[..., Any]],
        max_turns: int = 8,
        tool_timeout_s: float = 30.0,
        call_format: CallFormat = "auto",
        group_size: int = 1,
        system_prompt: str = "",
        reward_timeout_s: float | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            reward,
            sampling,
            group_size=group_size,
            system_prompt=system_prompt,
            reward_timeout_s=reward_timeout_s,
            chat_template_kwargs=chat_template_kwargs,
        )
        check_turns(max_turns)
        self.tools = Tools(tools, timeout_s=tool_timeout_s)
        self.max_turns = max_turns
        self.call_format: CallFormat = call_format
        self.template = replace(self.template, tools=self.tools.schemas)

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        num_calls = 0
        for turn in range(self.max_turns):
            try:
                response = await engine.agenerate(chat.request(self.sampling))
            except PromptTooLongError:
                if turn == 0:
                    raise
                return await self._finish(chat, row, num_calls, out_of_context=True)
            message = parse_answer(
                chat.text_of(response),
                self.tokenizer,
                schemas=self.tools.schemas,
                call_format=self.call_format,
                prompt=chat.prompt_text,
                num_calls=num_calls,
            )
            chat.add_response(response, message)
            if "tool_calls" not in message or turn + 1 == self.max_turns:
                break
            num_calls += len(message["tool_calls"])
            chat.add_messages(await self.tools.answer(message))
        return await self._finish(chat, row, num_calls)

    async def _finish(
        self, chat: Transcript, row: Row, num_calls: int, *, out_of_context: bool = False
    ) -> Trajectory:
        metrics = {"tool_calls": float(num_calls)}
        trajectory = await chat.finish(self.reward, row, metrics=metrics)
        return replace(trajectory, finish_reason="context") if out_of_context else trajectory


def check_turns(max_turns: int) -> None:
    """Raise ConfigError for a conversation without a turn."""
    if max_turns < 1:
        raise ConfigError(f"max_turns={max_turns} must be at least 1.")
