"""Agents that know nothing of training, as workflows: what they may do, and what becomes of it."""

import asyncio
import os
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from arealite.agents import AgentWorkflow, Episode
from arealite.errors import ConfigError, NoServerError, RewardError, TrajectoryError
from arealite.testing import ScriptedEngine
from arealite.types import Row, Trajectory
from tests.agents.conftest import SAMPLING, TOKENIZER, BrokenEngine, WatchedEngine, sampled_text

END = "<|im_end|>"
QUESTION: Any = [{"role": "user", "content": "Hi"}]


def client_of(episode: Episode) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key)


async def ask(episode: Episode, row: Row) -> None:
    """Ask once, and say nothing about a reward."""
    async with client_of(episode) as client:
        await client.chat.completions.create(model="m", messages=QUESTION)


def run(
    agent: Any, engine: ScriptedEngine | None = None, row: Row | None = None, **settings: Any
) -> list[Trajectory]:
    workflow = AgentWorkflow(TOKENIZER, agent, SAMPLING, **settings)
    return asyncio.run(workflow.arun_episode(engine or ScriptedEngine(["yes"]), row or {})) or []


async def is_yes(text: str, row: Row) -> float:
    return float(text == "yes") * row.get("scale", 1)


# --- Where the reward comes from ------------------------------------------------------------------


def test_the_reward_is_what_the_agent_returns():
    async def agent(episode: Episode, row: Row) -> float:
        await ask(episode, row)
        episode.set_reward(3.0)
        return 0.5

    assert [trajectory.reward for trajectory in run(agent, reward=is_yes)] == [0.5]


def test_or_what_it_told_the_episode():
    async def agent(episode: Episode, row: Row) -> None:
        await ask(episode, row)
        episode.set_reward(3.0)

    assert [trajectory.reward for trajectory in run(agent, reward=is_yes)] == [3.0]


def test_or_what_the_reward_function_says_of_the_last_answer():
    assert [t.reward for t in run(ask, reward=is_yes, row={"scale": 7})] == [7.0]


def test_an_agent_without_a_reward_is_told_how_to_give_one():
    with pytest.raises(TrajectoryError, match=r"agent ask gave no reward\. Return a number"):
        run(ask)
    with pytest.raises(TrajectoryError, match="agent ask gave no reward"):
        run(partial(ask))


def test_a_reward_function_that_fails_is_an_error():
    async def fails(text: str, row: Row) -> float:
        raise ValueError("no")

    with pytest.raises(RewardError):
        run(ask, reward=fails)


# --- What an agent may do -------------------------------------------------------------------------


def test_an_agent_may_block_in_a_thread_of_its_own():
    threads: list[str] = []

    def agent(episode: Episode, row: Row) -> float:
        threads.append(threading.current_thread().name)
        with OpenAI(base_url=episode.base_url, api_key=episode.api_key) as client:
            reply = client.chat.completions.create(model="m", messages=QUESTION)
        return float(reply.choices[0].message.content == "yes")

    assert [trajectory.reward for trajectory in run(agent, group_size=2)] == [1.0, 1.0]
    assert threads == ["arealite-call"] * 2


class Agent:
    """One with settings of its own, that can be called."""

    async def __call__(self, episode: Episode, row: Row) -> float:
        await ask(episode, row)
        return 1.0


@pytest.mark.parametrize("agent", [Agent(), lambda *of: Agent()(*of), partial(Agent())])
def test_whatever_can_be_called_may_be_an_agent(agent: Any):
    assert [trajectory.reward for trajectory in run(agent)] == [1.0]


PROGRAM = """
from openai import OpenAI
with OpenAI() as client:
    reply = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hi"}])
    good = float(reply.choices[0].message.content == "yes")
    client.post("/reward", cast_to=object, body={"reward": good})
"""


def test_an_agent_may_be_a_program():
    def agent(episode: Episode, row: Row) -> None:
        environment = os.environ | episode.environment
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)

    assert [trajectory.reward for trajectory in run(agent)] == [1.0]


def test_an_agent_may_ask_several_things_at_once():
    async def agent(episode: Episode, row: Row) -> float:
        async with client_of(episode) as client:
            create = partial(client.chat.completions.create, model="m")
            first = await create(messages=QUESTION)
            known = [*QUESTION, first.choices[0].message]
            questions = [[*known, {"role": "user", "content": f"{i}"}] for i in range(3)]
            await asyncio.gather(*(create(messages=each) for each in questions))
        return 1.0

    group = run(agent, ScriptedEngine(["a", "b"]))
    assert sorted(map(sampled_text, group)) == [f"a{END}b{END}", f"b{END}", f"b{END}"]
    # Parts of one sample, so that in the mean of its group the episode counts once.
    assert len({trajectory.sample for trajectory in group}) == 1
    assert [t.metrics for t in group][2] == {"turns": 4.0, "tool_calls": 0.0, "forks": 2.0}


def test_what_an_agent_leaves_running_ends_with_its_episode():
    engine = WatchedEngine(lambda text: "b" if "more" in text else "a")
    left: list[asyncio.Task[Any]] = []

    async def agent(episode: Episode, row: Row) -> float:
        async with client_of(episode) as client:
            create = partial(client.chat.completions.create, model="m")
            known = [*QUESTION, (await create(messages=QUESTION)).choices[0].message]
        await asyncio.to_thread(engine.began.get)
        engine.pause()
        client = client_of(episode)
        more: Any = [*known, {"role": "user", "content": "more"}]
        left.append(asyncio.create_task(client.chat.completions.create(model="m", messages=more)))
        left[0].add_done_callback(lambda _: closing.append(asyncio.create_task(client.close())))
        await asyncio.to_thread(engine.began.get)
        return 1.0

    closing: list[asyncio.Task[None]] = []

    async def episode() -> list[Trajectory] | None:
        group = await AgentWorkflow(TOKENIZER, agent, SAMPLING).arun_episode(engine, {})
        with pytest.raises(openai.AuthenticationError):
            await left[0]
        await asyncio.gather(*closing)
        return group

    group = asyncio.run(episode()) or []
    assert [sampled_text(trajectory) for trajectory in group] == [f"a{END}"]
    assert engine.cancelled.qsize() == 1


def test_settings_without_effect_are_named_once(capfd: pytest.CaptureFixture[str]):
    async def agent(episode: Episode, row: Row) -> float:
        async with client_of(episode) as client:
            await client.chat.completions.create(
                model="m", messages=QUESTION, temperature=0.1, seed=3, user="me"
            )
        return 1.0

    engine = ScriptedEngine(["yes"])
    run(agent, engine, group_size=3)
    assert {request.sampling.temperature for request in engine.requests} == {1.0}
    assert capfd.readouterr().err.count("the agent sets seed, temperature without effect") == 1


# --- What goes wrong ------------------------------------------------------------------------------


def test_an_error_of_the_agent_is_that_of_the_episode():
    async def agent(episode: Episode, row: Row) -> float:
        await ask(episode, row)
        raise LookupError("no such page")

    with pytest.raises(LookupError, match="no such page"):
        run(agent)


async def talk_on(episode: Episode, row: Row) -> None:
    """Ask again and again, and think of no end."""
    async with client_of(episode) as client:
        messages = [*QUESTION]
        while True:
            reply = await client.chat.completions.create(model="m", messages=messages)
            messages += [reply.choices[0].message, *QUESTION]


def told_is_long(text: str, row: Row) -> float:
    return float(text == "hm")


@pytest.mark.parametrize(("reward", "value"), [(None, 0.0), (told_is_long, 1.0)])
def test_an_agent_that_its_context_ends_is_trained_on_up_to_there(reward: Any, value: float):
    engine = ScriptedEngine(["hm"] * 99, max_model_len=200)
    [trajectory] = run(talk_on, engine, reward=reward)
    assert (trajectory.reward, trajectory.finish_reason) == (value, "context")
    assert sampled_text(trajectory) == f"hm{END}" * int(trajectory.metrics["turns"])


def test_an_agent_whose_first_question_does_not_fit_is_an_error():
    with pytest.raises(openai.BadRequestError) as refused:
        run(talk_on, ScriptedEngine(["hm"], max_model_len=20))
    assert refused.value.code == "context_length_exceeded"


def test_rewards_of_single_answers_are_enough():
    async def agent(episode: Episode, row: Row) -> None:
        async with client_of(episode) as client:
            for reward in (0.5, -2.0):
                reply = await client.chat.completions.create(model="m", messages=QUESTION)
                episode.set_reward(reward, completion_id=reply.id)

    assert {trajectory.reward for trajectory in run(agent)} == {-1.5}


def test_a_format_of_calls_that_nobody_reads_is_refused():
    with pytest.raises(ConfigError, match="call_format='hermez' must be one of auto, hermes, json"):
        AgentWorkflow(TOKENIZER, ask, SAMPLING, call_format="hermez")  # type: ignore[arg-type]


def test_an_agent_that_asks_nothing_is_told_where_to_ask():
    async def lazy(episode: Episode, row: Row) -> float:
        return 1.0

    with pytest.raises(TrajectoryError, match="agent lazy ended without an answer"):
        run(lazy)


@pytest.mark.fault(71, "the engine fails, whether the agent catches that or not")
@pytest.mark.parametrize("catches", [False, True])
def test_a_failure_of_the_engine_is_that_of_the_episode(catches: bool):
    async def agent(episode: Episode, row: Row) -> float:
        try:
            await ask(episode, row)
        except openai.APIError:
            if not catches:
                raise
        return 0.0

    error = NoServerError("No server is left.")
    with pytest.raises(NoServerError) as failed:
        run(agent, BrokenEngine(error))
    assert failed.value is error


def test_an_agent_may_ask_again_after_a_failure():
    async def agent(episode: Episode, row: Row) -> float:
        with pytest.raises(openai.InternalServerError):
            await ask(episode, row)
        await ask(episode, row)
        return 1.0

    engine = BrokenEngine(RuntimeError("once"), ["yes"], failures=1)
    assert [sampled_text(trajectory) for trajectory in run(agent, engine)] == [f"yes{END}"]


def test_the_calls_of_an_episode_that_is_cancelled_are_ended():
    engine = WatchedEngine(["yes"])
    engine.pause()
    ended = threading.Event()

    def agent(episode: Episode, row: Row) -> float:
        try:
            with OpenAI(base_url=episode.base_url, api_key=episode.api_key) as client:
                client.chat.completions.create(model="m", messages=QUESTION)
        finally:
            ended.set()
        return 1.0

    async def cancel() -> None:
        workflow = AgentWorkflow(TOKENIZER, agent, SAMPLING)
        running = asyncio.create_task(workflow.arun_sample(engine, {}))
        await asyncio.to_thread(engine.began.get)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel())
    engine.cancelled.get(timeout=10)
    assert ended.wait(timeout=10)
