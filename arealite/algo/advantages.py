"""Rewards to advantages: values in, values out, no engine and no ranks.

A group is the trajectories sampled from one prompt; groups may differ in size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain, islice

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
    over the steps that end with it or later; so early tokens answer for all that follows, also in
    later parts of their thread. A thread of which no step was rewarded is one step, with the reward
    of the whole, which counts once for each conversation.

    Args:
        groups: per prompt, the trajectories sampled from it, with their `step_rewards`.
        divide_by_std: also divide by the sample standard deviation of those step rewards.

    Source: process supervision of GRPO, arXiv:2402.03300 section 4.1.3, which does divide.
    """
    return [_step_advantages(group, divide_by_std) for group in groups]


@dataclass(frozen=True, slots=True)
class _Thread:
    """Parts of a conversation that follow each other."""

    parts: list[int]  # places in the group
    steps: list[tuple[int, float]]  # last token, counted over all parts, and reward
    is_one_step: bool  # no step was rewarded, so the whole is one


def _step_advantages(group: list[Trajectory], divide_by_std: bool) -> list[list[float]]:
    samples = [_threads(group, sample) for sample in _samples(group)]
    basis: list[float] = []
    for threads in samples:
        once = [thread for thread in threads if thread.is_one_step][:1]
        for thread in [thread for thread in threads if not thread.is_one_step] + once:
            basis += [reward for _, reward in thread.steps]
    threads = list(chain.from_iterable(samples))
    rewards = [reward for thread in threads for _, reward in thread.steps]
    centered = iter(_centered(rewards, basis, divide_by_std))
    advantages: list[list[float]] = [[] for _ in group]
    for thread in threads:
        masks = [group[part].loss_mask for part in thread.parts]
        gained = dict.fromkeys(range(sum(map(len, masks))), 0.0)
        gained |= {place: next(centered) for place, _ in thread.steps}
        to_go = reversed(list(accumulate(reversed(gained.values()))))
        for part, mask in zip(thread.parts, masks, strict=True):
            values = zip(islice(to_go, len(mask)), mask, strict=True)
            advantages[part] = [value if is_sampled else 0.0 for value, is_sampled in values]
    return advantages


def _threads(group: list[Trajectory], sample: list[int]) -> list[_Thread]:
    """The threads of a conversation."""
    reward = _mean([group[part].reward for part in sample])
    threads: list[_Thread] = []
    for parts in _gathered(sample, [group[part].thread for part in sample]):
        trajectories = [group[part] for part in parts]
        steps = _rewarded_steps(trajectories)
        whole = [(_last_sampled(trajectories), reward)]
        threads.append(_Thread(parts, steps or whole, is_one_step=not steps))
    return threads


def _rewarded_steps(parts: list[Trajectory]) -> list[tuple[int, float]]:
    starts = accumulate((len(part.token_ids) for part in parts), initial=0)
    return [
        (start + place, reward)
        for start, part in zip(starts, parts, strict=False)
        for place, reward in part.step_rewards
    ]


def _last_sampled(parts: list[Trajectory]) -> int:
    sampled = list(chain.from_iterable(part.loss_mask for part in parts))
    return len(sampled) - 1 - sampled[::-1].index(True)


def _sample_rewards(group: list[Trajectory]) -> list[float]:
    """One reward per conversation."""
    return [_mean([group[index].reward for index in sample]) for sample in _samples(group)]


def _samples(group: list[Trajectory]) -> list[list[int]]:
    """Of each conversation, where its parts are in the group."""
    return _gathered(range(len(group)), [trajectory.sample for trajectory in group])


def _gathered(indices: Iterable[int], keys: list[int]) -> list[list[int]]:
    """The indices of each key together; one below 0 is the key of nobody else."""
    gathered: dict[int, list[int]] = {}
    for index, key in zip(indices, keys, strict=True):
        gathered.setdefault(key if key >= 0 else ~index, []).append(index)
    return list(gathered.values())


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
