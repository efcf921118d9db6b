import math
from dataclasses import replace

import pytest

from arealite.algo.advantages import group_advantages, step_advantages
from arealite.types import Trajectory


def trajectory(reward: float) -> Trajectory:
    return Trajectory(
        token_ids=[1, 2],
        loss_mask=[False, True],
        behavior_logprobs=[0.0, -1.0],
        versions=[-1, 0],
        reward=reward,
        temperature=1.0,
        finish_reason="stop",
    )


def group(*rewards: float) -> list[Trajectory]:
    return [trajectory(reward) for reward in rewards]


def test_advantage_is_the_reward_minus_the_mean_of_its_own_group():
    assert group_advantages([group(1, 0, 0, 0), group(1, 1, 1, 0)]) == [
        [0.75, -0.25, -0.25, -0.25],
        [0.25, 0.25, 0.25, -0.75],
    ]


def test_dividing_by_the_group_std_gives_the_published_vector():
    first, second = group_advantages([group(1, 0, 0, 0), group(1, 1, 1, 0)], divide_by_std=True)
    assert first == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert second == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-5)


# 0.1 three times sums to 0.30000000000000004: a mean that is not 0.1.
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e300])
@pytest.mark.parametrize("size", [1, 3, 7, 10])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_group_of_equal_rewards_has_exactly_zero_advantage(
    reward: float, size: int, divide_by_std: bool
):
    advantages = group_advantages([group(*[reward] * size)], divide_by_std=divide_by_std)
    assert advantages == [[0.0] * size]


def test_groups_may_differ_in_size_and_may_be_empty():
    assert group_advantages([[], group(3), group(2, 0)]) == [[], [0.0], [1.0, -1.0]]


def test_scaling_the_reward_scales_the_advantage_only_without_the_std():
    plain, scaled = group(1, 0, 1, 1), group(5, -5, 5, 5)
    [by_mean], [scaled_by_mean] = group_advantages([plain]), group_advantages([scaled])
    assert scaled_by_mean == pytest.approx([10 * value for value in by_mean])
    [by_std] = group_advantages([plain], divide_by_std=True)
    [scaled_by_std] = group_advantages([scaled], divide_by_std=True)
    assert scaled_by_std == pytest.approx(by_std, abs=1e-5)
    assert math.fsum(by_std) == pytest.approx(0, abs=1e-12)


def test_a_conversation_in_two_parts_counts_once_in_the_mean():
    parts = [replace(trajectory(1.0), sample=0), replace(trajectory(1.0), sample=0)]
    [advantages] = group_advantages([[*parts, replace(trajectory(0.0), sample=1)]])
    assert advantages == [0.5, 0.5, -0.5]


def steps_of(num_tokens: int, *rewards: tuple[int, float]) -> Trajectory:
    """A prompt of one token, then this many sampled ones; rewards by place of a step's end."""
    return replace(
        trajectory(0.0),
        token_ids=list(range(num_tokens + 1)),
        loss_mask=[False] + [True] * num_tokens,
        step_rewards=rewards,
    )


def test_a_token_answers_for_the_steps_that_end_with_it_or_later():
    first = steps_of(4, (2, 1.0), (4, 0.0))
    second = steps_of(3, (1, 0.5), (3, 0.5))
    # The mean of 1, 0, .5 and .5 is .5, which leaves .5, -.5, 0 and 0.
    assert step_advantages([[first, second]]) == [
        [[0.0, 0.0, 0.0, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    ]


def test_steps_divided_by_their_std():
    [[first, second]] = step_advantages(
        [[steps_of(2, (1, 1.0), (2, 1.0)), steps_of(1, (1, 0.0))]], divide_by_std=True
    )
    # 1, 1 and 0: mean 2/3, sample standard deviation 1/sqrt(3).
    std = 3**-0.5
    assert first == pytest.approx([0.0, 2 / 3 / std, 1 / 3 / std], abs=1e-5)
    assert second == pytest.approx([0.0, -2 / 3 / std], abs=1e-5)


def test_without_step_rewards_the_whole_is_one_step():
    group_of_two = group(1, 0)
    [outcome] = group_advantages([group_of_two])
    [steps] = step_advantages([group_of_two])
    assert [tokens[-1] for tokens in steps] == outcome
    assert [tokens[0] for tokens in steps] == [0.0, 0.0]


def test_parts_of_conversations_that_are_equally_good_have_no_advantage_in_units_of_their_std():
    parts = [replace(trajectory(reward), sample=0) for reward in (0.0, 1.0)]
    other = replace(trajectory(0.5), sample=1)
    assert group_advantages([[*parts, other]], divide_by_std=True) == [[0.0] * 3]


def part(sample: int, num_tokens: int, *rewards: tuple[int, float], thread: int = 7) -> Trajectory:
    return replace(steps_of(num_tokens, *rewards), sample=sample, thread=thread + 10 * sample)


def test_the_parts_of_one_conversation_follow_each_other():
    first, second = part(0, 2, (1, 1.0)), part(0, 2, (2, 0.0))
    other = part(1, 1, (1, 0.5))
    # The mean of 1, 0 and .5 is .5. Behind the first step there is only the last one.
    assert step_advantages([[first, second, other]]) == [
        [[0.0, 0.0, -0.5], [0.0, -0.5, -0.5], [0.0, 0.0]]
    ]


def test_conversations_beside_each_other_do_not_answer_for_each_other():
    first, second = part(0, 2, (1, 1.0), thread=1), part(0, 2, (2, 0.0), thread=2)
    # The mean is .5: what the first gained is not taken back by the second.
    assert step_advantages([[first, second]]) == [[[0.0, 0.5, 0.0], [0.0, -0.5, -0.5]]]


def test_threads_without_steps_are_one_step_each_and_count_once():
    beside = [replace(part(0, 1, thread=t), reward=1.0) for t in (1, 2, 3)]
    group_of_two = [*beside, replace(trajectory(0.0), sample=1)]
    assert step_advantages([group_of_two]) == [[[0.0, 0.5]] * 3 + [[0.0, -0.5]]]


def test_a_part_without_a_step_of_its_own_answers_for_those_that_follow():
    whole = [part(0, 2), part(0, 1, (1, 1.0)), part(1, 1, (1, 0.0))]
    assert step_advantages([whole]) == [[[0.0, 0.5, 0.5], [0.0, 0.5], [0.0, -0.5]]]


def test_a_conversation_in_parts_without_steps_is_one_step_of_the_mean():
    parts = [replace(trajectory(1.0), sample=0) for _ in range(3)]
    group_of_two = [*parts, replace(trajectory(0.0), sample=1)]
    [outcome] = group_advantages([group_of_two])
    [steps] = step_advantages([group_of_two])
    assert [tokens[-1] for tokens in steps] == outcome == [0.5, 0.5, 0.5, -0.5]
