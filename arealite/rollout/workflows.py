"""Workflows: how one row becomes a group of episodes. Subclass `ChatWorkflow` for an agent."""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from arealite import dist
from arealite.api import InferenceEngine
from arealite.errors import ConfigError, PromptTooLongError, first_cause
from arealite.rewards.pool import RewardFn
from arealite.rollout.chat_template import ChatTemplate, Message, first_messages
from arealite.rollout.groups import flattened
from arealite.rollout.tools import CallFormat, Tools, check_call_format, parse_answer
from arealite.rollout.transcript import Transcript
from arealite.types import ModelResponse, Row, SamplingParams, Trajectory


@dataclass(eq=False, repr=False)
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
    """

    tokenizer: PreTrainedTokenizerBase
    reward: RewardFn
    """Text of the last response and row in, number out; see `Transcript.finish`."""
    sampling: SamplingParams
    _: KW_ONLY
    group_size: int = 1
    """Conversations per row; their mean reward is the baseline of each."""
    system_prompt: str = ""
    """First message of every conversation, if not empty."""
    reward_timeout_s: float | None = None
    """Limit of one call of the reward in seconds, beyond which the row is lost; None: that of the
    pool, 15."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as `enable_thinking`."""

    def __init_subclass__(cls) -> None:
        """Raise ConfigError for what the constructor would overwrite in silence."""
        bases = [base for base in cls.__bases__ if is_dataclass(base)]
        settings = {field.name for base in bases for field in fields(base)}
        hidden = settings & cls.__dict__.keys() - inspect.get_annotations(cls).keys()
        if hidden:
            names = ", ".join(sorted(hidden))
            raise ConfigError(
                f"{cls.__name__} defines {names}, which the constructor sets for each workflow. "
                f"Give it to the constructor, or make {cls.__name__} a dataclass in which it has "
                "a type hint."
            )

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's template with the variables, and with the tools that all rows share."""
        return ChatTemplate(self.tokenizer, kwargs=self.chat_template_kwargs or {})

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

    def start(
        self, question: str | Sequence[Message], template: ChatTemplate | None = None
    ) -> Transcript:
        """A conversation that begins with this question, or with these messages.

        Args:
            question: behind the system prompt, unless the messages begin with one of their own.
            template: another one than that of the workflow, such as with tools of its own.
        """
        messages = first_messages(question, self.system_prompt)
        return Transcript(
            template or self.template, messages, reward_timeout_s=self.reward_timeout_s
        )

    async def ask(self, engine: InferenceEngine, chat: Transcript) -> ModelResponse | None:
        """What the policy says next; None once the conversation fills the model's context.

        A first question that does not fit is an error: nothing can be learned from it.
        """
        try:
            return await engine.agenerate(chat.request(self.sampling))
        except PromptTooLongError:
            if not chat.num_turns:
                raise
            chat.is_full = True
            return None


class SingleTurnWorkflow(ChatWorkflow):
    """One question, one answer."""

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        chat.add_response(await engine.agenerate(chat.request(self.sampling)))
        return await chat.finish(self.reward, row)


class DynamicSampling:
    """Rejects groups whose rewards are all equal, which teach nothing: the next row is taken.

    What it costs is in `take_metrics`. Where nearly all are equal the run ends and says so: then
    the questions are too easy, or too hard.

    Args:
        workflow: whose groups these are.

    Source: DAPO, arXiv:2503.14476 section 3.2.
    """

    def __init__(self, workflow: ChatWorkflow) -> None:
        self.workflow = workflow
        self.group_size = workflow.group_size
        self._num_sampled = self._num_equal = self._num_extra = 0

    async def arun_episode(self, engine: InferenceEngine, row: Row) -> list[Trajectory] | None:
        group = await self.workflow.arun_episode(engine, row)
        if group is None:
            return None
        self._num_sampled += 1
        if len({trajectory.reward for trajectory in group}) > 1:
            return group
        self._num_equal += 1
        self._num_extra += len(group)
        return None

    def take_metrics(self) -> dict[str, float]:
        """Of the groups sampled since the last call: how many, and how many for nothing.

        A collective of all ranks; see `observe.metrics` for the names.
        """
        counts = [self._num_sampled, self._num_equal, self._num_extra]
        self._num_sampled = self._num_equal = self._num_extra = 0
        sampled, equal, extra = dist.sum(counts)
        return {
            "groups/sampled": sampled,
            "groups/sampled_constant_share": equal / sampled if sampled else math.nan,
            "groups/extra_samples": extra,
        }


@dataclass(eq=False, repr=False)
class MultiTurnWorkflow(ChatWorkflow):
    """Another try after feedback, until an answer is right.

    The reward of a conversation is that of its last answer, times `turn_discount` for each turn
    before; the raw reward is logged beside it, and that of turn k as `rollout/reward_turn_k`, over
    the conversations that came so far. One without more room in the context ends where it is.
    """

    _: KW_ONLY
    feedback: str | Callable[[str, Row], str] = "That is not right. Try again."
    """What an answer that is not right is told; a function of its text and the row, or always the
    same."""
    max_turns: int = 2
    """Answers at most."""
    turn_discount: float = 0.9
    """Applied once to the whole, and not to the reward of each turn."""
    right_from: float = 1.0
    """An answer is right whose reward is not below."""
    rewards_turns: bool = False
    """Also give each turn its own reward, as `step_rewards`; see
    `algo.advantages.step_advantages`."""

    def __post_init__(self) -> None:
        check_turns(self.max_turns)

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        rewards: list[float] = []
        while (response := await self.ask(engine, chat)) is not None:
            chat.add_response(response)
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


@dataclass(eq=False, repr=False)
class ToolWorkflow(ChatWorkflow):
    """One question, and an answer that may take calls of tools.

    The calls of a response are made at the same time and their results put into the conversation,
    until a response calls nothing; it is the answer. A conversation that has no more turns, or no
    more room in the context, ends where it is. Logs `rollout/tool_calls` per conversation.
    """

    _: KW_ONLY
    tools: Sequence[Callable[..., Any]] | Callable[[Row], Sequence[Callable[..., Any]]]
    """Functions with type hints and docstrings, see `Tools`; or a function of the row that makes
    those of one conversation, such as methods of an object that remembers what they did."""
    max_turns: int = 8
    """Responses at most."""
    tool_timeout_s: float = 30.0
    """Limit of one call in seconds, of tools that do not say `timeout_s` themselves."""
    max_result_chars: int = 10_000
    """Characters of a result that the model is shown."""
    call_format: CallFormat = "auto"
    """How the model writes a call."""

    def __post_init__(self) -> None:
        check_turns(self.max_turns)
        check_call_format(self.call_format)
        self._shared = None if callable(self.tools) else self._checked(self.tools)
        if self._shared is not None:
            self.template = replace(self.template, tools=self._shared.schemas)

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        if self._shared is not None:
            tools, chat = self._shared, self.start(row["question"])
        else:
            tools = self._made_for(row)
            chat = self.start(row["question"], replace(self.template, tools=tools.schemas))
        num_calls = 0
        for turn in range(self.max_turns):
            response = await self.ask(engine, chat)
            if response is None:
                break
            message = parse_answer(
                chat.text_of(response),
                self.tokenizer,
                schemas=tools.schemas,
                call_format=self.call_format,
                prompt=chat.prompt_text,
                num_calls=num_calls,
            )
            chat.add_response(response, message)
            if "tool_calls" not in message or turn + 1 == self.max_turns:
                break
            num_calls += len(message["tool_calls"])
            chat.add_messages(await tools.answer(message))
        return await chat.finish(self.reward, row, metrics={"tool_calls": float(num_calls)})

    def _made_for(self, row: Row) -> Tools:
        assert callable(self.tools)
        try:
            arguments = inspect.signature(self.tools).bind(row)
        except TypeError as error:
            raise self._no_tools(f"a function that does not take a row ({error})") from error
        return self._checked(self.tools(*arguments.args))

    def _checked(self, functions: object) -> Tools:
        if not isinstance(functions, list | tuple) or not all(map(callable, functions)):
            raise self._no_tools(f"{functions!r:.80}")
        return Tools(functions, timeout_s=self.tool_timeout_s, max_chars=self.max_result_chars)

    def _no_tools(self, found: str) -> ConfigError:
        return ConfigError(
            f"The tools of {type(self).__name__} are {found}. Give a list of functions, or a "
            "function of the row that returns one."
        )


def check_turns(max_turns: int) -> None:
    """Raise ConfigError for a conversation without a turn."""
    if max_turns < 1:
        raise ConfigError(f"max_turns={max_turns} must be at least 1.")
