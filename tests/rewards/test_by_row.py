import asyncio
import pickle
from functools import partial

import pytest

from arealite.errors import ConfigError, RewardError
from arealite.rewards.by_row import RewardByRow
from arealite.rewards.pool import RewardPool


def length(text: str, row: dict) -> float:
    return float(len(text))


async def half_length(text: str, row: dict) -> float:
    await asyncio.sleep(0)
    return len(text) / 2


def fails(text: str, row: dict) -> float:
    raise ValueError("no such luck")


REWARD = RewardByRow({"length": length, "half": half_length, "fails": fails})


def test_a_row_is_rewarded_by_the_function_that_it_names():
    assert REWARD("four", {"reward": "length"}) == 4.0
    assert REWARD.of({"reward": "half"}) is half_length
    assert pickle.loads(pickle.dumps(REWARD)) == REWARD


def test_a_pool_runs_the_function_that_the_row_names():
    with RewardPool(num_workers=1) as pool:
        score = partial(pool.score, REWARD, "four")

        async def both() -> list[float]:
            return await asyncio.gather(*(score({"reward": name}) for name in ("length", "half")))

        assert asyncio.run(both()) == [4.0, 2.0]
        with pytest.raises(RewardError, match=r"Reward fails .*no such luck"):
            asyncio.run(score({"reward": "fails"}))
        with pytest.raises(RewardError, match="'reward' is 'lenght'; there are length, half, fa"):
            asyncio.run(score({"reward": "lenght"}))


@pytest.mark.parametrize("row", [{}, {"reward": None}, {"reward": ["length"]}, {"reward": 1.0}])
def test_a_row_that_names_no_reward_is_an_error(row: dict):
    with pytest.raises(RewardError, match="there are length, half, fails"):
        REWARD("four", row)


@pytest.mark.parametrize(("rewards", "problem"), [({}, "nothing"), ({"math": 1.0}, "'math': 1.0")])
def test_what_is_no_function_is_refused_at_once(rewards: dict, problem: str):
    with pytest.raises(ConfigError, match=problem):
        RewardByRow(rewards)
