"""Random agents against a real server: the trainer gives each token the log-prob it came with."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from openai import APIStatusError, AsyncOpenAI

from arealite import dist
from arealite.agents import Endpoint
from arealite.inference.vllm import VLLMEngine
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import pack
from arealite.types import SamplingParams, Trajectory
from tests.inference.parity import LIMIT, checkpoint, push
from tests.rollout.chat_templates import NAMES
from tests.rollout.conversations import Dice, Message, Recorder
from tests.rollout.random_talks import Outcome, RandomAgent, Refused, make_episode

SAMPLING = SamplingParams(temperature=0.75, max_new_tokens=24)
NUM_OF_ITS_OWN_TEMPLATE = 12
NUM_OF_EACH_OTHER = 3


async def run_over_http(engine: VLLMEngine, endpoint: Endpoint, name: str, seed: str) -> Outcome:
    """A random agent that has nothing but the client that agents use."""
    dice, recorder = Dice(name, seed), Recorder(engine)
    episode = make_episode(dice, recorder, SAMPLING)
    async with (
        endpoint.serve(episode),
        AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key, max_retries=0) as client,
    ):

        async def ask(body: Message) -> Message:
            given = {key: value for key, value in body.items() if value is not None}
            try:
                completion = await client.chat.completions.create(**given)
            except APIStatusError as error:
                raise Refused(error.status_code, error.message) from error
            return completion.model_dump(exclude_none=True)

        return await RandomAgent(dice, episode, recorder, ask).run()


@contextmanager
def trainer_of(model: str) -> Iterator[FSDPEngine]:
    with FSDPEngine(model, FSDPConfig()) as trainer:
        yield trainer
    dist.close()


def gaps(trainer: FSDPEngine, trajectories: list[Trajectory]) -> torch.Tensor:
    """[tokens that were sampled] |server - trainer| log-prob."""
    groups = [[trajectory] for trajectory in trajectories]
    advantages = [[1.0]] * len(groups)
    [minibatch] = pack(groups, advantages, num_minibatches=1, max_tokens=4096, aggregation="token")
    computed = trainer.logprobs(minibatch)
    return torch.cat(
        [
            (logprobs - mb.behavior_logprobs).abs()[mb.loss_mask]
            for logprobs, mb in zip(computed, minibatch, strict=True)
        ]
    )


@pytest.mark.parametrize("tiny_model", ["tied"], indirect=True)
def test_what_random_agents_sampled_is_what_the_trainer_sees(engine: VLLMEngine, tiny_model: str):
    push(engine, checkpoint(tiny_model), 0)
    names = ["bytes"] * NUM_OF_ITS_OWN_TEMPLATE + NAMES * NUM_OF_EACH_OTHER

    async def run_all() -> list[Outcome]:
        runs = [run_over_http(engine, endpoint, name, str(i)) for i, name in enumerate(names)]
        return await asyncio.gather(*runs)

    with Endpoint() as endpoint, trainer_of(tiny_model) as trainer:
        outcomes = asyncio.run(run_all())
        trajectories = [each for outcome in outcomes for each in outcome.trajectories]
        found = gaps(trainer, trajectories)
    assert len(found) == sum(sum(each.loss_mask) for each in trajectories) > 1000
    assert found.mean() <= LIMIT
