"""Rewards that say more than right or wrong: groups in, groups with other rewards out.

The reward before any shaping stays in `raw_reward` and is logged beside the shaped one.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from arealite.errors import ConfigError
from arealite.types import Trajectory

Groups = list[list[Trajectory]]


def overlong_penalty(
    groups: Groups, *, max_tokens: int, tolerance: int, factor: float = 1.0
) -> Groups:
    """Take away up to `factor` from responses that come near their budget.

        reward + min(0, -(length - (max_tokens - tolerance)) / tolerance * factor)

    Args:
        max_tokens: budget of a response, `sampling.max_new_tokens`; lengths are sampled tokens.
        tolerance: how many tokens before the budget it begins; grows linearly from there.

    Source: soft overlong punishment of DAPO, arXiv:2503.14476 equation 13.
    """
    if not 0 < tolerance <= max_tokens:
        raise ConfigError(f"tolerance={tolerance} must be from 1 to max_tokens={max_tokens}.")

    def shaped(trajectory: Trajectory) -> float:
        excess = trajectory.response_length - (max_tokens - tolerance)
        return trajectory.reward + min(0.0, -excess / tolerance * factor)

    return _with_rewards(groups, shaped)


def scaled_rewards(groups: Groups, *, right: float, wrong: float) -> Groups:
    """Rewards from 0 to 1 as numbers from `wrong` to `right`, such as -5 and 5.

        wrong + (right - wrong) * reward

    It changes nothing where advantages are divided by their deviation.

    Source: AReaL v0.1 and v0.2, which reward 5 and -5.
    """
    return _with_rewards(groups, lambda t: wrong + (right - wrong) * t.reward)


def length_reward(groups: Groups, *, weight: float = 1.0, right: float = 1.0) -> Groups:
    """Reward short right answers, and make long ones cost, compared with their own group.

        reward + weight * (s if right else min(0, s)),
        s = 1/2 - (length - shortest) / (longest - shortest)

    Lengths are sampled tokens, of all parts of a conversation; where a group has one length only,
    nothing changes. So the budget follows what a prompt needs. The paper begins without it, as it
    slows learning at first, and raises the weight later.

    Args:
        weight: of it, beside the reward; 0 or more.
        right: responses whose reward before any shaping is at least this are right.

    Source: length reward of Kimi k1.5, arXiv:2501.12599 section 2.3.3.
    """
    if not weight >= 0:
        raise ConfigError(f"weight={weight} of the length reward must be 0 or more.")
    return [_length_rewarded(group, weight, right) for group in groups]


def _length_rewarded(group: list[Trajectory], weight: float, right: float) -> list[Trajectory]:
    lengths = _lengths(group)
    if len(set(lengths)) <= 1:
        return group
    shortest, longest = min(lengths), max(lengths)
    found = []
    for length, trajectory in zip(lengths, group, strict=True):
        share = 0.5 - (length - shortest) / (longest - shortest)
        bonus = share if _raw_reward(trajectory) >= right else min(0.0, share)
        found.append(_with_reward(trajectory, trajectory.reward + weight * bonus))
    return found


def _lengths(group: list[Trajectory]) -> list[int]:
    """Of each trajectory: the sampled tokens of all parts of its conversation."""
    keys = [t.sample if t.sample >= 0 else ~index for index, t in enumerate(group)]
    lengths: Counter[int] = Counter()
    for key, trajectory in zip(keys, group, strict=True):
        lengths[key] += trajectory.response_length
    return [lengths[key] for key in keys]


def _with_rewards(groups: Groups, shaped: Callable[[Trajectory], float]) -> Groups:
    return [[_with_reward(each, shaped(each)) for each in group] for group in groups]


def _with_reward(trajectory: Trajectory, reward: float) -> Trajectory:
    return replace(trajectory, reward=reward, raw_reward=_raw_reward(trajectory))


def _raw_reward(trajectory: Trajectory) -> float:
    return trajectory.reward if trajectory.raw_reward is None else trajectory.raw_reward
