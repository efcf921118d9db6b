"""Rewards to advantages: values in, values out, no engine and no ranks.

A group is the trajectories sampled from one prompt; groups may differ in size.
"""

import math
from itertools import accumulate

from arealite.types import Trajectory

STD_EPS = 1e-6


def group_advantages(
    groups: list[list[Trajectory]], *, divide_by_std: bool = False
) -> list[list[float]]:
    """Reward minus its group's mean, one advantage per trajectory.

    A group in which every reward is equal, or of one trajectory, gets zeros: it carries no
    preference. A conversation in several parts counts once in the mean, with the mean of theirs.

    Args:
        groups: per prompt, the trajectories sampled from it; sizes may differ.
        divide_by_std: also divide by the group's sample standard deviation plus 1e-6. Off by
            default: it gives more weight to prompts that are nearly always right or wrong.

    Source: GRPO, arXiv:2402.03300 section 4.1; without the division, Dr. GRPO, arXiv:2503.20783.
    """
    return [
        _centered([t.reward for t in group], _sample_rewards(group), divide_by_std)
        for group in groups
    ]


def step_advantages(
    groups: list[list[Trajectory]], *, divide_by_std: bool = False
) -> list[list[list[float]]]:
    """One advantage for each token of each trajectory: the centered rewards of what it led to.

    Centered is a step's reward less the mean of all step rewards of the group. A token gets the sum
    over the steps that end with it or later; so early tokens answer for all that follows. A
    trajectory of which no step was rewarded is one step, with the reward of the whole.

    Args:
        groups: per prompt, the trajectories sampled from it, with their `step_rewards`.
        divide_by_std: also divide by the sample standard deviation of those step rewards.

    Source: process supervision of GRPO, arXiv:2402.03300 section 4.1.3, which does divide.
    """
    return [_step_advantages([_steps(t) for t in group], group, divide_by_std) for group in groups]


def _step_advantages(
    steps: list[list[tuple[int, float]]], group: list[Trajectory], divide_by_std: bool
) -> list[list[float]]:
    rewards = [reward for each in steps for _, reward in each]
    centered = iter(_centered(rewards, rewards, divide_by_std))
    advantages: list[list[float]] = []
    for trajectory, each in zip(group, steps, strict=True):
        gained = dict.fromkeys(range(len(trajectory.token_ids)), 0.0)
        gained |= {place: next(centered) for place, _ in each}
        to_go = list(accumulate(reversed(gained.values())))[::-1]
        sampled = zip(to_go, trajectory.loss_mask, strict=True)
        advantages.append([value if is_sampled else 0.0 for value, is_sampled in sampled])
    return advantages


def _steps(trajectory: Trajectory) -> list[tuple[int, float]]:
    """Last token and reward of each step."""
    if trajectory.step_rewards:
        return list(trajectory.step_rewards)
    sampled = [place for place, is_sampled in enumerate(trajectory.loss_mask) if is_sampled]
    return [(sampled[-1], trajectory.reward)]


def _sample_rewards(group: list[Trajectory]) -> list[float]:
    """One reward per conversation."""
    samples: dict[int, list[float]] = {}
    for index, trajectory in enumerate(group):
        is_alone = trajectory.sample < 0
        samples.setdefault(~index if is_alone else trajectory.sample, []).append(trajectory.reward)
    return [_mean(rewards) for rewards in samples.values()]


def _centered(rewards: list[float], basis: list[float], divide_by_std: bool) -> list[float]:
    """The rewards less the mean of `basis`, over its standard deviation."""
    if len(set(rewards) | set(basis)) <= 1:
        return [0.0] * len(rewards)
    mean = _mean(basis)
    centered = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centered
    if len(set(basis)) == 1:  # no sample was better than another; parts of one may differ
        return [0.0] * len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in basis) / (len(basis) - 1)
    return [value / (math.sqrt(variance) + STD_EPS) for value in centered]


def _mean(values: list[float]) -> float:
    # That of equal floats need not be that float: 0.1 three times leaves 1e-17, not zero.
    return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)
