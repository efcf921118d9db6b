import math
from dataclasses import replace
from itertools import chain
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arealite.algo.advantages import (
    batch_normalized,
    group_advantages,
    leave_one_out_advantages,
    mean_and_std,
    reward_advantages,
    step_advantages,
    token_rewards,
)
from arealite.errors import ConfigError
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


def test_leaving_one_out_gives_the_published_vector():
    [first, alone] = leave_one_out_advantages([group(1, 0, 0, 0), group(3)])
    assert first == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], abs=1e-12)
    assert alone == [0.0]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_leaving_one_out_is_the_reward_less_the_mean_of_the_others(rewards: list[float]):
    [advantages] = leave_one_out_advantages([group(*rewards)])
    others = [fmean(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    assert advantages == pytest.approx(
        [r - o for r, o in zip(rewards, others, strict=True)], abs=1e-9
    )


GROUPS = [group(1, 0, 0, 0), group(1, 1, 1, 0)]


def alone(values: list[float]) -> list[float]:
    """The sum over the ranks of a process that has none beside it."""
    return list(values)


def test_the_group_mean_over_the_deviation_of_the_batch_gives_the_published_vector():
    centered = group_advantages(GROUPS)
    first, second = batch_normalized(centered, GROUPS, over="trajectories", sum_over_ranks=alone)
    assert first == pytest.approx([1.6202, -0.5401, -0.5401, -0.5401], abs=1e-4)
    assert second == pytest.approx([0.5401, 0.5401, 0.5401, -1.6202], abs=1e-4)


def test_long_responses_weigh_more_where_tokens_are_counted():
    long, short = steps_of(3), replace(steps_of(1), reward=1.0)
    [[first, second]] = batch_normalized(
        reward_advantages([[long, short]]), [[long, short]], over="tokens", sum_over_ranks=alone
    )
    # 0, 0, 0 and 1: mean 1/4, sample standard deviation 1/2.
    assert first == pytest.approx(-0.5, abs=1e-5)
    assert second == pytest.approx(1.5, abs=1e-5)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=2, max_size=9))
def test_normalized_over_tokens_the_batch_has_mean_zero_and_deviation_one(
    drawn: list[tuple[float, int]],
):
    groups = [[replace(steps_of(length), reward=reward) for reward, length in drawn]]
    [advantages] = batch_normalized(
        reward_advantages(groups), groups, over="tokens", sum_over_ranks=alone
    )
    per_token = list(
        chain.from_iterable([a] * n for a, (_, n) in zip(advantages, drawn, strict=True))
    )
    rewards = list(chain.from_iterable([r] * n for r, n in drawn))
    if max(rewards) - min(rewards) < 1e-2:
        return
    assert fmean(per_token) == pytest.approx(0, abs=1e-6)
    assert stdev(per_token) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("reward", [0.0, 5.0, 0.1, -1 / 3])
def test_a_batch_of_equal_rewards_has_exactly_zero_advantage(reward: float):
    groups = [group(*[reward] * 7), group(*[reward] * 3)]
    assert batch_normalized(
        reward_advantages(groups), groups, over="tokens", sum_over_ranks=alone
    ) == [[0.0] * 7, [0.0] * 3]


def test_five_for_right_and_minus_five_for_wrong_is_the_same_as_one_and_zero():
    plain, scaled = [group(1, 0, 1, 1)], [group(5, -5, 5, 5)]
    for over in ("tokens", "trajectories"):
        [first] = batch_normalized(reward_advantages(plain), plain, over=over, sum_over_ranks=alone)
        [second] = batch_normalized(
            reward_advantages(scaled), scaled, over=over, sum_over_ranks=alone
        )
        assert first == pytest.approx(second, abs=1e-5)


def test_ranks_normalize_over_all_that_they_have_together():
    whole = [group(1, 0, 0), group(1, 1)]
    expected = batch_normalized(
        reward_advantages(whole), whole, over="tokens", sum_over_ranks=alone
    )
    told: list[list[float]] = [[2.0, 2.0], []]  # what the other rank adds: sum and count

    def with_the_other(values: list[float]) -> list[float]:
        if len(values) == 2:
            return [a + b for a, b in zip(values, told[0], strict=True)]
        return [values[0] + 2 * (1 - 3 / 5) ** 2]

    found = batch_normalized(
        reward_advantages(whole[:1]), whole[:1], over="tokens", sum_over_ranks=with_the_other
    )
    assert found[0] == pytest.approx(expected[0], abs=1e-12)


def test_what_to_normalize_over_is_named():
    with pytest.raises(ConfigError, match=r"over='words' must be 'tokens' or 'trajectories'"):
        batch_normalized([], [], over="words", sum_over_ranks=alone)  # type: ignore[arg-type]


def test_the_reward_of_a_trajectory_stands_at_its_last_sampled_token():
    alone, stepped = replace(steps_of(2), reward=0.5), replace(steps_of(3, (1, 1.0)), reward=9.0)
    tail = replace(alone, token_ids=[0] * 4, loss_mask=[False, True, True, False])
    assert token_rewards([[alone, stepped], [tail]]) == [
        [[0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.5, 0.0]],
    ]


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 4)), max_size=9))
def test_mean_and_deviation_are_those_of_the_numbers_written_out(drawn: list[tuple[float, int]]):
    values = torch.tensor([value for value, _ in drawn], dtype=torch.float64)
    counts = torch.tensor([count for _, count in drawn])
    written_out = list(chain.from_iterable([value] * count for value, count in drawn))
    mean, std = mean_and_std(values, counts, sum_over_ranks=alone)
    assert mean == pytest.approx(fmean(written_out) if written_out else 0.0, abs=1e-9)
    assert std == pytest.approx(stdev(written_out) if len(written_out) > 1 else 0.0, abs=1e-9)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float64, 1e-16), (torch.float32, 3e-8)])
def test_where_only_rounding_differs_the_deviation_is_exactly_zero(dtype: torch.dtype, step: float):
    values = torch.tensor([0.1, 0.1 + step, 0.1 - step], dtype=dtype)
    assert len(set(values.tolist())) > 1
    assert mean_and_std(values, torch.ones(3), sum_over_ranks=alone)[1] == 0.0
    apart = torch.tensor([0.1, 0.1001], dtype=dtype)
    assert mean_and_std(apart, torch.ones(2), sum_over_ranks=alone)[1] > 0.0


def test_a_reward_stands_before_all_that_was_not_sampled_at_the_end():
    told = replace(
        steps_of(1), reward=0.5, token_ids=[0] * 4, loss_mask=[False, True, False, False]
    )
    assert token_rewards([[told]]) == [[[0.0, 0.5, 0.0, 0.0]]]


def test_one_without_a_number_is_a_conversation_of_its_own_beside_those_with_one():
    alone = replace(trajectory(1.0), sample=-1)
    parts = [replace(trajectory(0.0), sample=0) for _ in range(2)]
    # Two conversations, of rewards 1 and 0.
    assert group_advantages([[alone, *parts]]) == [[0.5, -0.5, -0.5]]


def test_a_batch_that_was_centered_before_is_only_divided_by_its_deviation():
    batch = [group(3, 1)]
    [found] = batch_normalized(
        reward_advantages(batch), batch, over="tokens", sum_over_ranks=alone, is_centered=False
    )
    assert found == pytest.approx([3 / 2**0.5, 1 / 2**0.5], abs=1e-5)


@pytest.mark.parametrize("is_centered", [True, False])
@pytest.mark.parametrize(("rewards", "expected"), [([], [[]]), ([3.0], [[0.0]])])
def test_a_batch_of_one_or_none_has_no_advantage(
    is_centered: bool, rewards: list[float], expected: list[list[float]]
):
    batch = [group(*rewards)]
    found = batch_normalized(
        [rewards], batch, over="trajectories", sum_over_ranks=alone, is_centered=is_centered
    )
    assert found == expected


def test_no_trajectory_is_normalized_without_an_advantage():
    with pytest.raises(ValueError, match="zip"):
        batch_normalized([[1.0]], [group(1, 0)], over="tokens", sum_over_ranks=alone)
