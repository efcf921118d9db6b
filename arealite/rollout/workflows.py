"""Workflows: how one row becomes a group of episodes. Subclass `ChatWorkflow` for an agent."""

import asyncio

from transformers import PreTrainedTokenizerBase

from arealite.api import InferenceEngine
from arealite.errors import first_cause
from arealite.rewards.pool import RewardFn
from arealite.rollout.transcript import Message, Transcript
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
    ) -> None:
        self.tokenizer = tokenizer
        self.reward = reward
        self.sampling = sampling
        self.group_size = group_size
        self.system_prompt = system_prompt
        self.reward_timeout_s = reward_timeout_s

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
        return [sample.result() for sample in samples]

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        """One conversation: what an agent overrides."""
        raise NotImplementedError(f"{type(self).__name__} must define arun_sample.")

    def start(self, question: str) -> Transcript:
        """A conversation that begins with this question."""
        messages: list[Message] = [{"role": "user", "content": question}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return Transcript(self.tokenizer, messages, reward_timeout_s=self.reward_timeout_s)


class SingleTurnWorkflow(ChatWorkflow):
    """One question, one answer."""

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        chat.add_response(await engine.agenerate(chat.request(self.sampling)))
        return await chat.finish(self.reward, row)
