"""Trains an agent that is not ours: a function that talks to an OpenAI-compatible endpoint."""

import asyncio
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any

from transformers import PreTrainedTokenizerBase

from arealite import background
from arealite.agents.endpoint import Endpoint, default_endpoint
from arealite.agents.episode import Episode
from arealite.api import InferenceEngine
from arealite.errors import TrajectoryError
from arealite.rewards.pool import RewardFn, score
from arealite.rollout.tools import CallFormat, check_call_format
from arealite.rollout.workflows import ChatWorkflow
from arealite.types import Row, SamplingParams, Trajectory

Agent = Callable[[Episode, Row], Any]
"""A `def` or `async def`; what it returns, if it is a number, is the reward."""


class AgentWorkflow(ChatWorkflow):
    """A group of episodes of an agent; each of its calls is trained on, token for token.

    Example: an agent that knows nothing of training.

        async def agent(episode, row):
            async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key) as client:
                messages = [{"role": "user", "content": row["question"]}]
                answer = await client.chat.completions.create(model="policy", messages=messages)
                return float(row["answer"] in answer.choices[0].message.content)

    Args:
        agent: runs one episode: an `async def` on the rollout loop, which it must not block; a
            `def` in a thread of its own. The reward is what it returns, or what it has told
            `episode.set_reward`, or what `reward` says, or the sum of what it told of its answers.
            One that ends with an error since its conversation fills the context ends there, with a
            reward of 0 if nothing else is known.
        sampling: decides how tokens are sampled, whatever the agent asks for; an agent may ask for
            fewer tokens, and for stop texts.
        reward: of the last answer's text and the row.
        endpoint: where agents find their episode; None: one of this process, on this host only.
        call_format: how the model writes a call of a tool.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        agent: Agent,
        sampling: SamplingParams,
        *,
        reward: RewardFn | None = None,
        endpoint: Endpoint | None = None,
        call_format: CallFormat = "auto",
        group_size: int = 1,
        reward_timeout_s: float | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            reward or _no_reward,
            sampling,
            group_size=group_size,
            reward_timeout_s=reward_timeout_s,
            chat_template_kwargs=chat_template_kwargs,
        )
        check_call_format(call_format)
        self.agent = agent
        self.endpoint = endpoint
        self.call_format: CallFormat = call_format
        self._has_warned = False

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        if self.endpoint is None:
            self.endpoint = await asyncio.to_thread(default_endpoint)
        episode = Episode(
            engine,
            self.tokenizer,
            self.sampling,
            call_format=self.call_format,
            chat_template_kwargs=self.template.kwargs,
        )
        async with self.endpoint.serve(episode):
            try:
                returned = await _run(self.agent, episode, row)
            except Exception as error:
                if episode.failure is not None:
                    raise episode.failure from error
                if not (episode.is_full and episode.has_answers):
                    raise
                returned = None
        if episode.failure is not None:  # which is not the policy's, whatever the agent made of it
            raise episode.failure
        self._warn_of(episode)
        reward = await self._reward_of(episode, returned, row)
        *earlier, last = await episode.trajectories(reward)
        return replace(last, earlier=tuple(earlier))

    async def _reward_of(self, episode: Episode, returned: object, row: Row) -> float:
        name = getattr(getattr(self.agent, "func", self.agent), "__name__", "")
        if not episode.has_answers:
            raise TrajectoryError(
                f"The agent {name} ended without an answer of the policy. Send its calls to "
                "episode.base_url with episode.api_key, and await them."
            )
        if isinstance(returned, Real):
            return float(returned)
        if episode.reward is not None:
            return episode.reward
        if self.reward is _no_reward and (episode.step_rewards or episode.is_full):
            return sum(episode.step_rewards)
        if self.reward is _no_reward:
            raise TrajectoryError(
                f"The agent {name} gave no reward. Return a number, call episode.set_reward, or "
                "give AgentWorkflow a reward function."
            )
        return await score(self.reward, episode.last_text, row, timeout_s=self.reward_timeout_s)

    def _warn_of(self, episode: Episode) -> None:
        """Say once which settings of the agent change nothing."""
        if episode.without_effect and not self._has_warned:
            self._has_warned = True
            print(
                f"warning: the agent sets {', '.join(sorted(episode.without_effect))} without "
                "effect: how tokens are sampled is up to the run (sampling.*).",
                file=sys.stderr,
                flush=True,
            )


async def _run(agent: Agent, episode: Episode, row: Row) -> object:
    if inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(type(agent).__call__):
        return await agent(episode, row)
    returned = await background.in_thread(agent, episode, row)
    return await returned if inspect.isawaitable(returned) else returned


def _no_reward(text: str, row: Row) -> float:
    raise NotImplementedError
