"""Virtual time: it jumps over sleeps, stands still for threads, and ends a wait for nothing."""

import asyncio
import concurrent.futures
import threading
import time

import pytest

from arealite.errors import DeadlineError
from arealite.rollout.workflows import ChatWorkflow, SingleTurnWorkflow
from arealite.testing import ScriptedEngine, byte_tokenizer, run_with_virtual_clock
from arealite.types import SamplingParams
from tests.rollout.agents import TalkativeAgent

ROW = {"question": "How much is 20 + 4?", "answer": "24"}


async def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_the_result_comes_back_and_time_starts_at_zero():
    assert run_with_virtual_clock(now_s()) == 0.0


def test_an_hour_of_sleep_takes_no_time():
    async def sleep() -> float:
        await asyncio.sleep(3600)
        return await now_s()

    began = time.monotonic()
    assert run_with_virtual_clock(sleep()) == pytest.approx(3600)
    assert time.monotonic() - began < 1


def test_sleeps_end_in_the_order_of_their_times():
    async def sleep_for(seconds: float, ended: list[float]) -> None:
        await asyncio.sleep(seconds)
        ended.append(await now_s())

    async def many() -> list[float]:
        ended: list[float] = []
        async with asyncio.TaskGroup() as group:
            for seconds in (7200, 0.001, 86400.5, 60, 1e6):
                group.create_task(sleep_for(seconds, ended))
        return ended

    assert run_with_virtual_clock(many()) == pytest.approx([0.001, 60, 7200, 86400.5, 1e6])


def test_a_deadline_passes_before_a_longer_sleep_ends():
    async def late() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(600):
                await asyncio.sleep(601)
        return await now_s()

    assert run_with_virtual_clock(late()) == pytest.approx(600)


def test_an_error_comes_back_and_its_finally_may_sleep():
    cleaned_at: list[float] = []

    async def fail() -> None:
        try:
            raise KeyError("no such row")
        finally:
            await asyncio.sleep(30)
            cleaned_at.append(await now_s())

    with pytest.raises(KeyError, match="no such row"):
        run_with_virtual_clock(fail())
    assert cleaned_at == [30]


def test_a_thread_takes_no_virtual_time():
    release = threading.Event()

    async def beside_a_sleep() -> tuple[float, float]:
        timer = asyncio.create_task(asyncio.sleep(100))
        asyncio.get_running_loop().call_soon(release.set)
        async with asyncio.timeout(1):
            await asyncio.to_thread(release.wait)
        thread_ended = await now_s()
        await timer
        return thread_ended, await now_s()

    assert run_with_virtual_clock(beside_a_sleep()) == pytest.approx((0, 100))


def test_a_thread_that_hangs_ends_in_an_error_that_names_who_waits():
    async def wait_for_nobody() -> None:
        await asyncio.wrap_future(concurrent.futures.Future())

    with pytest.raises(DeadlineError, match=r"wait_for_nobody waits for took longer than 0.05 s"):
        run_with_virtual_clock(wait_for_nobody(), outside_timeout_s=0.05)


def test_a_wait_that_nothing_can_end_is_an_error_at_once():
    async def wait_for_nobody() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineError, match=r"Nothing can run any more: .*wait_for_nobody waits"):
        run_with_virtual_clock(wait_for_nobody())


def test_a_paused_engine_that_nobody_resumes_is_found():
    engine = ScriptedEngine(["#### 24"])
    engine.pause()
    with pytest.raises(DeadlineError, match="an engine that nobody resumes"):
        run_with_virtual_clock(agent(TalkativeAgent).arun_episode(engine, ROW))


def agent(workflow: type[ChatWorkflow], **settings: int) -> ChatWorkflow:
    async def is_24(text: str, row: dict) -> float:
        await asyncio.sleep(5)
        return float(text.endswith(row["answer"]))

    return workflow(byte_tokenizer(), is_24, SamplingParams(), **settings)


def test_a_slow_engine_and_a_slow_reward_take_virtual_time_only():
    engine = ScriptedEngine(["#### 24"], seconds_per_token=10)  # 8 tokens with the end token

    async def episode() -> tuple[list[float], float]:
        group = await agent(SingleTurnWorkflow, group_size=3).arun_episode(engine, ROW)
        assert group is not None
        return [trajectory.reward for trajectory in group], await now_s()

    rewards, seconds = run_with_virtual_clock(episode())
    assert rewards == [1.0] * 3
    assert seconds == pytest.approx(8 * 10 + 5)


def test_a_reward_in_a_worker_process_is_not_late_by_the_virtual_clock():
    def is_24(text: str, row: dict) -> float:
        return float(text.endswith(row["answer"]))

    workflow = SingleTurnWorkflow(byte_tokenizer(), is_24, SamplingParams())

    async def episode() -> list[float]:
        async with asyncio.timeout(0.001):
            group = await workflow.arun_episode(ScriptedEngine(["#### 24"]), ROW)
        assert group is not None
        return [trajectory.reward for trajectory in group]

    assert run_with_virtual_clock(episode()) == [1.0]
