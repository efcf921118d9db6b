"""Rollouts beside a (pretended) training loop, against the scripted engine."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from arealite.errors import (
    ConfigError,
    DataError,
    DeadlineError,
    PromptTooLongError,
    RolloutError,
    TrajectoryError,
)
from arealite.rollout.executor import RolloutConfig, RolloutExecutor, run_episodes
from arealite.testing import ScriptedEngine
from arealite.types import Cursor, Row, Trajectory

ROWS: list[Row] = [{"id": i} for i in range(10)]
Episode = Callable[[ScriptedEngine, Row], Awaitable[list[Trajectory] | None]]


class Workflow:
    """A workflow made of one function."""

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


def executor(episode: Episode, *, start: Cursor | None = None, **cfg: float) -> RolloutExecutor:
    settings: dict = {"prompts_per_step": 2, "max_staleness": 1} | cfg
    return RolloutExecutor(
        ScriptedEngine(replies=[]), Workflow(episode), ROWS, RolloutConfig(**settings), start=start
    )


def places(groups: list[list[Trajectory]]) -> list[int]:
    return [group[0].row_index for group in groups]


def test_batches_come_in_the_order_of_the_rows_whatever_finishes_first():
    async def slow_when_even(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        await asyncio.sleep(0.05 if row["id"] % 2 == 0 else 0)
        return await answer(engine, row)

    with executor(slow_when_even) as rollouts:
        for version in range(4):
            assert places(rollouts.next_batch()) == [2 * version, 2 * version + 1]
            rollouts._engine.version = version + 1


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


def test_a_rejected_row_is_recorded_and_the_next_one_takes_its_place():
    async def reject_first(engine: ScriptedEngine, row: Row) -> list[Trajectory] | None:
        return None if row["id"] == first else await answer(engine, row)

    with executor(answer, prompts_per_step=1) as rollouts:
        first = rollouts.next_batch()[0][0].reward
    with executor(reject_first, max_staleness=0) as rollouts:
        assert places(rollouts.next_batch()) == [2, 1]
        assert [(row.place, row.reason) for row in rollouts.take_lost()] == [(0, "rejected")]


def test_next_batch_raises_when_every_episode_raises():
    async def broken(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        raise KeyError("missing")

    with executor(broken) as rollouts, pytest.raises(RolloutError, match="KeyError: 'missing'"):
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
    async def reject(engine: ScriptedEngine, row: Row) -> None:
        return None

    with executor(reject) as rollouts, pytest.raises(RolloutError, match="what the workflow rej"):
        rollouts.next_batch()


@pytest.mark.parametrize("kind", [PromptTooLongError, DataError])
def test_a_row_that_no_setting_of_the_run_can_use_stops_it_at_once(kind: type[Exception]):
    async def unusable(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        raise kind("900 tokens leave no room")

    with executor(unusable) as rollouts, pytest.raises(kind, match="900 tokens"):
        rollouts.next_batch()


def test_next_batch_says_what_it_waited_for():
    async def hang(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        await asyncio.sleep(100)
        return []

    with (
        executor(hang, batch_timeout_s=0.1) as rollouts,
        pytest.raises(DeadlineError, match=r"step 0 has 0 of 2 groups; 2 of the others are run"),
    ):
        rollouts.next_batch()


def test_an_episode_that_hangs_is_ended_at_its_deadline():
    async def hang(engine: ScriptedEngine, row: Row) -> list[Trajectory]:
        await asyncio.sleep(100)
        return []

    with (
        executor(hang, episode_timeout_s=0.05) as rollouts,
        pytest.raises(RolloutError, match="TimeoutError"),
    ):
        rollouts.next_batch()


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


def test_a_resumed_run_continues_with_the_rows_that_were_not_consumed():
    with executor(answer, prompts_per_step=4, max_staleness=2) as rollouts:
        assert places(rollouts.next_batch()) == [0, 1, 2, 3]
        cursor = rollouts.cursor(1)
    with executor(answer, prompts_per_step=4, start=cursor) as resumed:
        assert places(resumed.next_batch()) == [4, 5, 6, 7]


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
