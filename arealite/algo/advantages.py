"""Rewards to advantages: values in, values out, no engine and no ranks.

A group is the trajectories sampled from one prompt; groups may differ in size.
"""

import math

from arealite.types import Trajectory

STD_EPS = 1e-6


def group_advantages(
    groups: list[list[Trajectory]], *, divide_by_std: bool = False
) -> list[list[float]]:
    """Reward minus its group's mean, one advantage per trajectory.

    A group in which every reward is equal, or of one trajectory, gets zeros: it carries no
    preference.

    Args:
        groups: per prompt, the trajectories sampled from it; sizes may differ.
        divide_by_std: also divide by the group's sample standard deviation plus 1e-6. Off by
            default: it gives more weight to prompts that are nearly always right or wrong.

    Source: GRPO, arXiv:2402.03300 section 4.1; without the division, Dr. GRPO, arXiv:2503.20783.
    """
    return [_centered([t.reward for t in group], divide_by_std) for group in groups]


def _centered(rewards: list[float], divide_by_std: bool) -> list[float]:
    # The mean of equal floats need not be that float: 0.1 three times leaves 1e-17, not zero.
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centered
    variance = math.fsum(value * value for value in centered) / (len(rewards) - 1)
    return [value / (math.sqrt(variance) + STD_EPS) for value in centered]
