from dataclasses import replace

import pytest

from arealite.algo.advantages import group_advantages
from arealite.algo.shaping import overlong_penalty, scaled_rewards
from arealite.errors import ConfigError
from arealite.types import Trajectory


def response(length: int, reward: float = 1.0) -> Trajectory:
    return Trajectory(
        token_ids=[1] * (length + 2),
        loss_mask=[False] * 2 + [True] * length,
        behavior_logprobs=[0.0] * (length + 2),
        versions=[-1] * 2 + [0] * length,
        reward=reward,
        temperature=1.0,
        finish_reason="stop",
    )


@pytest.mark.parametrize(
    ("length", "reward"), [(1, 1.0), (60, 1.0), (61, 0.975), (80, 0.5), (100, 0.0)]
)
def test_the_penalty_grows_from_where_the_tolerance_begins(length: int, reward: float):
    [[found]] = overlong_penalty([[response(length)]], max_tokens=100, tolerance=40)
    assert found.reward == pytest.approx(reward)
    assert found.raw_reward == 1.0


def test_the_penalty_has_a_factor_and_only_takes_away():
    [group] = overlong_penalty(
        [[response(100, -1.0), response(10, -1.0)]], max_tokens=100, tolerance=50, factor=0.5
    )
    assert [each.reward for each in group] == [-1.5, -1.0]


@pytest.mark.parametrize("tolerance", [0, -1, 101])
def test_a_tolerance_outside_of_the_budget_is_refused(tolerance: int):
    with pytest.raises(ConfigError, match="must be from 1 to max_tokens=100"):
        overlong_penalty([], max_tokens=100, tolerance=tolerance)


def test_five_and_minus_five_scale_what_is_not_normalized_and_nothing_else():
    group = [response(3, reward) for reward in (1.0, 0.0, 0.0, 0.5)]
    scaled = scaled_rewards([group], right=5.0, wrong=-5.0)
    assert [each.reward for each in scaled[0]] == [5.0, -5.0, -5.0, 0.0]
    assert [each.raw_reward for each in scaled[0]] == [1.0, 0.0, 0.0, 0.5]
    [plain], [large] = group_advantages([group]), group_advantages(scaled)
    assert large == pytest.approx([10 * value for value in plain])
    [plain], [large] = (group_advantages(each, divide_by_std=True) for each in ([group], scaled))
    assert large == pytest.approx(plain, abs=1e-4)


def test_what_was_raw_before_stays_the_raw_reward():
    shaped_before = replace(response(3, 0.9), raw_reward=1.0)
    [[found]] = overlong_penalty([[shaped_before]], max_tokens=10, tolerance=2)
    assert (found.reward, found.raw_reward) == (0.9, 1.0)
