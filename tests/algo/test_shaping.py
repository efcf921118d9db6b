from dataclasses import replace

import pytest

from arealite.algo.advantages import group_advantages
from arealite.algo.shaping import length_reward, overlong_penalty, scaled_rewards
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


def test_short_right_answers_gain_and_long_ones_lose():
    group = [response(length, reward) for length, reward in ((10, 1), (20, 1), (30, 1), (15, 1))]
    [found] = length_reward([group])
    # From 10 to 30 tokens: half a point for the shortest, down to minus half.
    assert [each.reward for each in found] == [1.5, 1.0, 0.5, 1.25]
    assert [each.raw_reward for each in found] == [1.0] * 4


def test_a_short_wrong_answer_gains_nothing():
    group = [response(10, 0.0), response(30, 0.0), response(20, 1.0)]
    [found] = length_reward([group], weight=0.5)
    assert [each.reward for each in found] == [0.0, -0.25, 1.0]


def test_a_group_of_one_length_keeps_its_rewards():
    groups = [[response(5, 1.0), response(5, 0.0)], [response(7)], []]
    assert length_reward(groups) == groups


def test_right_is_what_was_right_before_any_shaping():
    short, long = replace(response(10, 0.2), raw_reward=1.0), response(30, 5.0)
    assert [each.reward for each in length_reward([[short, long]])[0]] == [0.7, 4.5]
    [found] = length_reward([[short, long]], right=3.0)
    assert [each.reward for each in found] == [0.2, 4.5]
    assert found[0].raw_reward == 1.0


def test_a_conversation_is_as_long_as_its_parts_together():
    parts = [replace(response(10), sample=0), replace(response(20), sample=0)]
    [found] = length_reward([[*parts, response(10), response(20)]])
    assert [each.reward for each in found] == [0.5, 0.5, 1.5, 1.0]


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_length_reward_with_a_negative_weight_is_refused(weight: float):
    with pytest.raises(ConfigError, match="length reward must be 0 or more"):
        length_reward([], weight=weight)


def test_the_tolerance_may_be_one_token_or_all_the_budget():
    assert [
        overlong_penalty([[response(50)]], max_tokens=100, tolerance=tolerance)[0][0].reward
        for tolerance in (1, 100)
    ] == [1.0, 0.5]


def test_a_length_reward_of_no_weight_changes_no_reward():
    [found] = length_reward([[response(10), response(30)]], weight=0.0)
    assert [each.reward for each in found] == [1.0, 1.0]


def test_one_without_a_number_is_as_long_as_itself_beside_a_conversation_in_parts():
    alone, parts = replace(response(10), sample=-1), [replace(response(10), sample=0)] * 2
    [found] = length_reward([[alone, *parts]])
    assert [each.reward for each in found] == [1.5, 0.5, 0.5]
