"""Rollouts beside a (pretended) training loop, against the scripted engine."""

import asyncio
import re
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from arealite import dist
from arealite.api import InferenceEngine
from arealite.errors import (
    ConfigError,
    DataError,
    DeadlineError,
    NoServerError,
    PromptTooLongError,
    RolloutError,
    TrajectoryError,
)
from arealite.rollout.executor import RolloutConfig, RolloutExecutor, run_episodes
from arealite.rollout.witness import Witness
from arealite.rollout.workflows import ChatWorkflow, SingleTurnWorkflow
from arealite.testing import ScriptedEngine, byte_tokenizer
from arealite.types import Cursor, LostRow, Row, SamplingParams, Trajectory
from arealite.waits import waiting
from tests.observe.ranks import run_on_two_ranks

ROWS: list[Row] = [{"id": i} for i in range(10)]
Episode = Callable[[ScriptedEngine, Row], Awaitable[list[Trajectory] | None]]


@pytest.fixture(autouse=True)
def episodes_may_make_trajectories_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of them do not ask the engine; what it sampled is looked at in test_witness.py."""
    monkeypatch.setattr(Witness, "problem_with", lambda *_: "")


class Workflow:
    """A workflow made of one function."""

    group_size = 1

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    async def arun_episode(self, engine: ScriptedEngine, row: Row) -> list[Trajectory] | None:
        return await self._episode(engine, row)


def trajectory(row: Row, *, version: int = 0, **overrides: object) -> Trajectory:
    fields: dict = {
        "token_ids": [1, 2],
        "loss_mask": [False, True],
        "behavior_logprobs": [0.0, -1.0],
        "versions": [-1, version],
        "reward": float(row["id"]),
        "temperature": 1.0,
        "finish_reason": "stop",
    }
    return Trajectory(**(fields | overrides))


async def answer(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
    return [trajectory(row, version=engine.version)]


def executor(
    episode: Episode, *, start: Cursor | None = None, **cfg: float | str
) -> RolloutExecutor:
    settings: dict = {"prompts_per_step": 2, "max_staleness": 1} | cfg
    return RolloutExecutor(
        ScriptedEngine(replies=[]), Workflow(episode), ROWS, RolloutConfig(**settings), start=start
    )


def places(groups: list[list[Trajectory]]) -> list[int]:
    return [group[0].row_index for group in groups]


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_batches_come_in_the_order_of_the_rows_whatever_finishes_first():
    async def slow_when_even(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        await asyncio.sleep(0.05 if row["id"] % 2 == 0 else 0)
        return await answer(engine, row)

    with executor(slow_when_even) as rollouts:
        for version in range(4):
            assert places(rollouts.next_batch()) == [2 * version, 2 * version + 1]
            rollouts._engine.version = version + 1


class EngineWithRoom(ScriptedEngine):
    """Says how many requests more it would work on at once, and counts who asks."""

    free: int | None = 0
    times_asked = 0

    @property
    def room(self) -> int | None:
        self.times_asked += 1
        return self.free

    def wait_until_asked(self) -> None:
        """Until whatever may start has started."""
        enough = self.times_asked + 3
        while self.times_asked < enough:
            time.sleep(0.001)


def test_the_engine_may_sleep_once_a_batch_is_there():
    class Sleepy(ScriptedEngine):
        naps = 0

        def sleep(self) -> None:
            self.naps += 1

    engine = Sleepy(replies=[])
    cfg = RolloutConfig(prompts_per_step=2, max_staleness=0, batch_timeout_s=0.3)
    with RolloutExecutor(engine, Workflow(answer), ROWS, cfg) as rollouts:
        rollouts.next_batch()
        assert engine.naps == 1
        with pytest.raises(DeadlineError):
            rollouts.next_batch()
        assert engine.naps == 1


def test_episodes_start_when_the_engine_has_room_for_their_groups():
    started: list[int] = []

    async def take_room(engine: EngineWithRoom, row: Row) -> list[Trajectory]:
        started.append(row["id"])
        engine.free = engine.free and engine.free - 4
        return await answer(engine, row)

    engine, workflow = EngineWithRoom(replies=[]), Workflow(take_room)
    workflow.group_size = 4
    cfg = RolloutConfig(prompts_per_step=8, max_staleness=1)
    with RolloutExecutor(engine, workflow, ROWS, cfg) as rollouts:
        engine.wait_until_asked()
        assert len(started) == 0
        engine.free = 9  # two groups, and a part of a third, which waits a moment for the rest
        engine.wait_until_asked()
        assert len(started) == 3
        engine.free = None  # it does not say
        assert len(rollouts.next_batch()) == 8


def test_an_epoch_uses_every_row_once():
    with executor(answer, prompts_per_step=10) as rollouts:
        rewards = [group[0].reward for group in rollouts.next_batch()]
    assert sorted(rewards) == [float(i) for i in range(10)]
    assert rewards != sorted(rewards), "the order should be shuffled"


def test_no_group_is_older_than_max_staleness_when_one_episode_is_slow():
    async def slow_once(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        started = engine.version
        await asyncio.sleep(0.1 if row["id"] == 3 else 0)
        return [trajectory(row, version=started)]

    with executor(slow_once, max_staleness=2) as rollouts:
        for version in range(8):
            ages = [version - group[0].versions[1] for group in rollouts.next_batch()]
            assert 0 <= min(ages) <= max(ages) <= 2
            rollouts._engine.version = version + 1


def test_a_rejected_row_is_recorded_and_those_behind_it_move_up():
    async def reject_first(engine: ScriptedEngine, row: Row) -> list[Trajectory] | None:
        return None if row["id"] == first else await answer(engine, row)

    with executor(answer, prompts_per_step=1) as rollouts:
        first = rollouts.next_batch()[0][0].reward
    with executor(reject_first, max_staleness=0) as rollouts:
        assert places(rollouts.next_batch()) == [1, 2]
        assert [(row.place, row.reason) for row in rollouts.take_lost()] == [(0, "rejected")]


def test_too_many_failures_are_counted_by_kind_with_the_first_one_as_the_cause():
    calls = count()

    async def broken(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        raise KeyError("missing") if next(calls) % 2 else OSError("no luck")

    with executor(broken) as rollouts, pytest.raises(RolloutError) as raised:
        rollouts.next_batch()
    assert str(raised.value).startswith("7 of the latest 7 episodes failed (OSError 4, KeyError 3)")
    assert "The first: OSError: no luck\n" in str(raised.value)
    assert isinstance(raised.value.__cause__, OSError)
    assert traceback.extract_tb(raised.value.__cause__.__traceback__)[-1].name == "broken"


def test_a_failure_of_long_ago_is_not_the_cause_of_many_today():
    calls = count()

    async def broken_at_first_and_at_last(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        call = next(calls)
        if call == 0:
            raise OSError("long ago")
        if call > 70:
            raise KeyError("today")
        return await answer(engine, row)

    with executor(broken_at_first_and_at_last, prompts_per_step=10, max_staleness=0) as rollouts:
        for version in range(7):
            rollouts.next_batch()
            rollouts._engine.version = version + 1
        with pytest.raises(RolloutError, match=r"7 of the latest 64 .* KeyError: 'today'"):
            rollouts.next_batch()


def test_a_single_failure_is_recorded_with_its_kind_and_training_goes_on():
    async def fail_once(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        if row["id"] == 4:
            raise OSError("no luck")
        return await answer(engine, row)

    with executor(fail_once, prompts_per_step=10, max_staleness=0) as rollouts:
        assert len(rollouts.next_batch()) == 10
        assert [row.reason for row in rollouts.take_lost()] == ["failed: OSError: no luck"]


def test_a_workflow_that_rejects_everything_ends_in_a_diagnosis():
    calls = count()

    async def reject(engine: ScriptedEngine, row: Row) -> None:
        if next(calls) == 1:
            raise OSError("no luck")

    with executor(reject) as rollouts, pytest.raises(RolloutError) as raised:
        rollouts.next_batch()
    assert "85 rows in a row gave no group (rejected 84, OSError 1)" in str(raised.value)
    assert "of the data set, {'id': " in str(raised.value)
    assert "Check what Workflow.arun_episode rejects" in str(raised.value)


def test_a_window_lets_finished_rows_overtake_a_slow_one_until_its_last_chance():
    calls, released = count(), threading.Event()

    async def first_one_waits(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        if next(calls) == 0:
            await wait_for(released.is_set)
        return await answer(engine, row)

    with executor(first_one_waits, order="window", max_staleness=2) as rollouts:
        for version in range(2):
            assert 0 not in places(rollouts.next_batch())
            rollouts._engine.version = version + 1
        released.set()
        assert places(rollouts.next_batch())[0] == 0


@pytest.mark.parametrize("ends_in", ["cancelled", "answer", "error"])
def test_ready_takes_the_first_to_finish_and_records_once_what_got_too_old(ends_in: str):
    calls, has_ended = count(), threading.Event()

    async def first_one_hangs(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        if next(calls) == 0:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                has_ended.set()
                if ends_in == "error":
                    raise OSError("in the middle of something") from None
                if ends_in == "cancelled":
                    raise
        return await answer(engine, row)

    with executor(first_one_hangs, order="ready") as rollouts:
        for version in range(6):
            assert 0 not in places(rollouts.next_batch())
            rollouts._engine.version = version + 1
            assert version == 0 or has_ended.wait(10)
        assert [(row.place, row.reason) for row in rollouts.take_lost()] == [(0, "too old")]
        assert 0 not in rollouts.cursor(6).pending


def test_a_finished_group_that_got_too_old_is_recorded_with_its_length_and_reward():
    calls, released = count(), threading.Event()

    async def first_four_wait(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        if next(calls) < 4:
            await wait_for(released.is_set)
            return [trajectory(row, reward=0.0), trajectory(row, reward=0.5)]
        return await answer(engine, row)

    with executor(first_four_wait, order="ready", max_staleness=2) as rollouts:
        assert places(rollouts.next_batch()) == [4, 5]
        rollouts._engine.version = 1
        assert places(rollouts.next_batch()) == [6, 7]
        rollouts._engine.version = 2
        asyncio.run(wait_for(lambda: len(rollouts._admission._done) == 2))
        released.set()
        asyncio.run(wait_for(lambda: len(rollouts._admission._done) == 6))
        assert places(rollouts.next_batch()) == [0, 1]  # the last chance of four, and two fit
        asyncio.run(wait_for(lambda: len(rollouts._lost) == 2))
        assert rollouts.take_lost() == [
            LostRow(place=place, reason="too old", response_length=1.0, reward=0.25)
            for place in (2, 3)
        ]


def test_an_order_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.order='fastest' is none of \('fifo', "):
        executor(answer, order="fastest")


def test_a_row_that_the_model_cannot_read_stops_the_run_at_once():
    async def unusable(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        raise DataError("the tokenizer has no such word")

    with executor(unusable) as rollouts, pytest.raises(DataError, match="no such word"):
        rollouts.next_batch()


def test_a_conversation_that_outgrows_the_context_costs_its_row_only():
    async def outgrow(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        if row["id"] == 3:
            raise PromptTooLongError("a prompt of 900 tokens leaves no room")
        return await answer(engine, row)

    with executor(outgrow, prompts_per_step=10) as rollouts:
        assert len(rollouts.next_batch()) == 10
        lost = rollouts.take_lost()[0]
    assert lost.reason == "failed: PromptTooLongError: a prompt of 900 tokens leaves no room"


class Panic(BaseException):
    """What a library written in another language raises when it breaks."""


@pytest.mark.parametrize("kind", [Panic, SystemExit, asyncio.CancelledError, KeyboardInterrupt])
def test_an_evaluation_names_what_is_no_ordinary_exception(kind: type[BaseException]):
    async def panic(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        raise kind("bye")

    with pytest.raises(RolloutError, match=rf"{kind.__name__}: bye|cancelled from within"):
        run_episodes(ScriptedEngine(replies=[]), Workflow(panic), ROWS[:1])


def test_rows_that_cannot_be_read_are_recorded():
    class Unreadable(list[Row]):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

    cfg = RolloutConfig(prompts_per_step=2, max_staleness=1)
    rows = Unreadable(ROWS)
    with (
        RolloutExecutor(ScriptedEngine(replies=[]), Workflow(answer), rows, cfg) as rollouts,
        pytest.raises(RolloutError, match=r"OSError 7.*the disk is gone"),
    ):
        rollouts.next_batch()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"reward": float("nan")}, "the reward nan, which is not a finite number"),
        ({"reward": None}, "the reward None"),
        ({"behavior_logprobs": [0.0, float("-inf")]}, "a behavior log-prob that is not finite"),
        ({"versions": [-1, -1]}, r"versions \[-1\], the engine being at 0"),
        ({"versions": [-1, 2]}, r"versions \[2\], the engine being at 0"),
    ],
)
def test_values_that_would_spoil_a_batch_are_refused(fields: dict[str, object], problem: str):
    async def spoil(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        return [trajectory(row, **fields)]

    with executor(spoil) as rollouts, pytest.raises(RolloutError, match=problem):
        rollouts.next_batch()


def test_many_failures_show_where_the_first_one_arose():
    async def misspell(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        return row["anwser"]

    with executor(misspell) as rollouts, pytest.raises(RolloutError) as raised:
        rollouts.next_batch()
    assert "The first: KeyError: 'anwser'\n" in str(raised.value)
    assert re.search(r'test_executor.py", line \d+, in misspell\n', str(raised.value))
    assert 'return row["anwser"]' in str(raised.value)


def test_next_batch_says_what_it_waited_for():
    async def hang(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        await asyncio.sleep(100)
        return []

    with (
        executor(hang, batch_timeout_s=0.1) as rollouts,
        pytest.raises(
            DeadlineError, match=r"step 0 needs 2 groups; finished: 0, running: 4 \(the oldest are"
        ),
    ):
        rollouts.next_batch()


def test_an_episode_that_hangs_is_ended_at_its_deadline():
    async def hang(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        await asyncio.sleep(100)
        return []

    with (
        executor(hang, episode_timeout_s=0.05) as rollouts,
        pytest.raises(RolloutError) as raised,
    ):
        rollouts.next_batch()
    assert "longer than rollout.episode_timeout_s=0.05. Raise it" in str(raised.value)
    assert re.search(r'test_executor.py", line \d+, in hang\n', str(raised.value))
    assert str(raised.value).endswith("await asyncio.sleep(100)")


class SlowAgent(ChatWorkflow):
    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        await asyncio.sleep(100 if row["id"] == 1 else 0)
        return trajectory(row)


@pytest.mark.parametrize("group_size", [1, 3])
def test_an_evaluation_ends_a_slow_episode_at_its_deadline_with_the_row_and_the_line_of_the_agent(
    group_size: int,
):
    agent = SlowAgent(byte_tokenizer(), lambda *_: 0.0, SamplingParams(), group_size=group_size)
    limits = RolloutConfig(episode_timeout_s=0.05)
    with pytest.raises(RolloutError) as raised:
        run_episodes(ScriptedEngine(replies=[]), agent, ROWS, limits=limits)
    assert "failed on the row {'id': 1}" in str(raised.value)
    assert str(raised.value).endswith('await asyncio.sleep(100 if row["id"] == 1 else 0)')


def test_a_deadline_promises_no_line_where_none_of_the_user_is_on_the_stack():
    engine = ScriptedEngine(["#### 24"], seconds_per_token=10)
    workflow = SingleTurnWorkflow(byte_tokenizer(), lambda *_: 0.0, SamplingParams())
    row = {"question": "Half of 48?", "answer": "#### 24"}
    with pytest.raises(RolloutError, match=r"episode_timeout_s=0\.05\. Raise it\.$"):
        run_episodes(engine, workflow, [row], limits=RolloutConfig(episode_timeout_s=0.05))


def fail_on_rank_1(folder: Path) -> str:
    async def fail(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        if dist.rank() == 1:
            raise TrajectoryError("a row of rank 1")
        await asyncio.sleep(100)  # its own rows would take much longer than the others' failure
        return []

    began_s = time.monotonic()
    try:
        run_episodes(ScriptedEngine(replies=[]), Workflow(fail), ROWS[:2])
    except RolloutError as error:
        assert time.monotonic() - began_s < 50
        return str(error)
    return ""


def test_an_evaluation_that_fails_on_one_rank_raises_on_all(tmp_path: Path):
    for failure in run_on_two_ranks(fail_on_rank_1, tmp_path):
        assert "a row of rank 1" in failure


def test_an_evaluation_tries_a_failed_episode_once_more():
    calls = count()

    async def fail_once(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        if next(calls) == 0:
            raise OSError("a flaky tool")
        return await answer(engine, row)

    groups = run_episodes(ScriptedEngine(replies=[]), Workflow(fail_once), ROWS)
    assert [group[0].reward for group in groups] == [float(i) for i in range(10)]


def test_an_evaluation_without_a_server_says_so_at_once():
    async def ask(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        raise NoServerError("all gone")

    with pytest.raises(NoServerError, match=r"^all gone$"):
        run_episodes(ScriptedEngine(replies=[]), Workflow(ask), ROWS)


def test_a_forgotten_await_is_named():
    forgotten = answer(ScriptedEngine(replies=[]), ROWS[0])

    async def forget(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        return forgotten  # type: ignore[return-value]

    with pytest.raises(RolloutError, match=r"returned a coroutine. Put `await` before what"):
        run_episodes(ScriptedEngine(replies=[]), Workflow(forget), ROWS[:1])
    forgotten.close()  # type: ignore[attr-defined]


def test_close_ends_running_episodes():
    ended = []

    async def hang(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(row["id"])
        return []

    with executor(hang):
        time.sleep(0.1)
    assert len(ended) == 4


def test_misaligned_trajectories_name_the_workflow_and_the_field():
    async def crooked(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        return [trajectory(row, versions=[0])]

    with pytest.raises(RolloutError, match=r"Workflow.arun_episode returned 1 versions for 2") as e:
        run_episodes(ScriptedEngine(replies=[]), Workflow(crooked), ROWS)
    assert isinstance(e.value.__cause__, TrajectoryError)


def test_one_trajectory_instead_of_a_list_names_the_workflow():
    async def lonely(engine: ScriptedEngine, row: Row) -> Trajectory:
        return trajectory(row)

    with pytest.raises(
        RolloutError, match=r"Workflow.arun_episode returned Trajectory\(.*a list of"
    ):
        run_episodes(ScriptedEngine(replies=[]), Workflow(lonely), ROWS)  # type: ignore[arg-type]


def test_a_resumed_run_continues_with_the_rows_that_were_not_consumed():
    with executor(answer, prompts_per_step=4, max_staleness=2) as rollouts:
        assert places(rollouts.next_batch()) == [0, 1, 2, 3]
        cursor = rollouts.cursor(1)
    with executor(answer, prompts_per_step=4, start=cursor) as resumed:
        assert places(resumed.next_batch()) == [4, 5, 6, 7]


def test_a_lost_row_is_met_again_by_a_run_that_was_killed_before_it_was_recorded():
    calls = count()

    async def reject_first(engine: ScriptedEngine, row: Row) -> list[Trajectory] | None:
        return None if next(calls) == 0 else await answer(engine, row)

    with executor(reject_first, max_staleness=0) as rollouts:
        assert places(rollouts.next_batch()) == [1, 2]
        assert rollouts.cursor(1) == Cursor(version=1, next_row=3, pending=(0,))
        assert [row.place for row in rollouts.take_lost()] == [0]
        assert rollouts.cursor(1) == Cursor(version=1, next_row=3)


def test_what_an_episode_makes_of_being_cancelled_at_the_end_is_not_a_failure():
    began = []

    async def fail_when_cancelled(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        began.append(row)
        try:
            await asyncio.sleep(100)
        finally:
            raise OSError("cut off")

    with executor(fail_when_cancelled) as rollouts:
        asyncio.run(wait_for(lambda: len(began) == 4))
    assert rollouts.take_lost() == []
    assert rollouts.cursor(0).pending == (0, 1, 2, 3)


def test_an_engine_may_be_evaluated_with_the_weights_on_disk_before_the_first_push():
    async def sample(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        return [trajectory(row, version=engine.version)]

    engine = ScriptedEngine(replies=[])
    engine.version = -1
    groups = run_episodes(engine, Workflow(sample), ROWS)
    assert [group[0].versions for group in groups] == [[-1, -1]] * len(ROWS)


def test_evaluation_keeps_the_order_of_the_rows():
    groups = run_episodes(ScriptedEngine(replies=[]), Workflow(answer), ROWS)
    assert [group[0].reward for group in groups] == [float(i) for i in range(10)]


def test_a_batch_that_does_not_divide_by_the_ranks_names_the_nearest_that_do(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"prompts_per_step=16 .* 3 ranks .* Set it to 15 or 18"):
        executor(answer, prompts_per_step=16)


def test_rollouts_before_the_first_push_are_refused():
    engine = ScriptedEngine(replies=[])
    engine.version = -1
    with pytest.raises(ConfigError, match="push_weights once before the first rollout"):
        RolloutExecutor(engine, Workflow(answer), ROWS, RolloutConfig(prompts_per_step=2))


# --- Slips of a workflow --------------------------------------------------------------------------


def test_an_episode_that_takes_too_long_says_what_it_waited_for():
    async def hang(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        with waiting("a tool of the user"):
            await asyncio.sleep(100)
        return []

    limits = RolloutConfig(episode_timeout_s=0.05)
    with pytest.raises(RolloutError, match=r"Raise it, or see why it waited for a tool of the us"):
        run_episodes(ScriptedEngine(replies=[]), Workflow(hang), ROWS[:1], limits=limits)


class ForgotToAwait(ChatWorkflow):
    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Any:
        chat = self.start("Hi")
        chat.add_response(await engine.agenerate(chat.request(self.sampling)))
        forgotten = chat.finish(1.0)
        row["forgotten"] = forgotten
        return forgotten


class ReturnsNone(ChatWorkflow):
    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Any:
        return None


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (ForgotToAwait, r"ForgotToAwait\.arun_episode returned a coroutine\. Put `await` before"),
        (ReturnsNone, r"ReturnsNone\.arun_episode returned a list with None\. Return a list of Tr"),
    ],
)
def test_a_slip_in_one_conversation_names_the_workflow(kind: type[ChatWorkflow], problem: str):
    row: Row = {}
    agent = kind(byte_tokenizer(), lambda *_: 0.0, SamplingParams())
    with pytest.raises(RolloutError, match=problem):
        run_episodes(ScriptedEngine(["a"]), agent, [row])
    if "forgotten" in row:
        row["forgotten"].close()


def test_an_episode_that_blocks_the_event_loop_is_told_so():
    async def block(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        time.sleep(1.6)
        await asyncio.sleep(10)
        return []

    limits = RolloutConfig(episode_timeout_s=0.1)
    with pytest.raises(RolloutError, match=r"or see who blocked the event loop for [12] s"):
        run_episodes(ScriptedEngine(replies=[]), Workflow(block), ROWS[:1], limits=limits)


class NotACoroutine(Workflow):
    def arun_episode(self, engine: ScriptedEngine, row: Row) -> None: ...  # type: ignore[override]


class AGenerator(Workflow):
    async def arun_episode(self, engine: ScriptedEngine, row: Row):  # type: ignore[override]
        yield trajectory(row)


@pytest.mark.parametrize("kind", [NotACoroutine, AGenerator])
def test_an_episode_that_cannot_be_awaited_ends_the_run_at_once(kind: type[Workflow]):
    engine = ScriptedEngine(replies=[])
    complaint = f"{kind.__name__}.arun_episode is not a coroutine function. Write `async def"
    with pytest.raises(ConfigError, match=complaint):
        run_episodes(engine, kind(answer), ROWS)
    with (
        RolloutExecutor(engine, kind(answer), ROWS, RolloutConfig(prompts_per_step=2)) as rollouts,
        pytest.raises(ConfigError, match=complaint),
    ):
        rollouts.next_batch()


def test_the_member_of_a_group_that_is_no_trajectory_is_named():
    async def partly(engine: ScriptedEngine, row: Row) -> Any:
        return [trajectory(row), None]

    with pytest.raises(RolloutError, match=r"returned a list with None\. Return a list of Traj"):
        run_episodes(ScriptedEngine(replies=[]), Workflow(partly), ROWS[:1])


def test_an_evaluation_that_rejects_every_row_says_so(capsys: pytest.CaptureFixture[str]):
    async def reject(engine: ScriptedEngine, row: Row) -> None:
        return None

    assert run_episodes(ScriptedEngine(replies=[]), Workflow(reject), ROWS) == []
    assert "warning: Workflow rejected all of the 10 rows of an eval" in capsys.readouterr().out


def test_an_error_of_the_loop_is_not_hidden_by_an_executor_that_does_not_close(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> None:
        raise DeadlineError("it did not stop")

    with pytest.raises(KeyError, match="the true one"), executor(answer) as rollouts:
        close = rollouts.close
        monkeypatch.setattr(rollouts, "close", fail)
        raise KeyError("the true one")
    close()
    assert "warning: it did not stop" in capsys.readouterr().err
