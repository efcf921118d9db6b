"""Rewards to advantages: values in, values out, no engine and no ranks.

A group is the trajectories sampled from one prompt; groups may differ in size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Literal

import torch

from arealite.errors import ConfigError
from arealite.types import Trajectory

STD_EPS = 1e-6
EQUAL = 1e-12
"""Standard deviation of a batch, over its mean, that only rounding leaves in float64."""

SumOverRanks = Callable[[Sequence[float]], list[float]]
"""Adds numbers up, place by place, over all ranks: `arealite.dist.sum`."""


def group_advantages(
    groups: list[list[Trajectory]], *, divide_by_std: bool = False
) -> list[list[float]]:
    """Reward minus its group's mean, one advantage per trajectory.

        A = reward - mean of the group,   or   (reward - mean) / (std + 1e-6)

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


def leave_one_out_advantages(groups: list[list[Trajectory]]) -> list[list[float]]:
    """Reward minus the mean reward of the others in its group, one advantage per trajectory.

        A = reward - (sum of the group - reward) / (n - 1)

    The baseline does not depend on what it is subtracted from, so it leaves the gradient unbiased;
    it is n / (n - 1) times `group_advantages`. A conversation in several parts counts once. A group
    of one has nothing to compare with and gets zeros.

    Source: RLOO, arXiv:2402.14740 equation 8.
    """
    return [
        [value * _leave_one_out(len(_samples(group))) for value in advantages]
        for group, advantages in zip(groups, group_advantages(groups), strict=True)
    ]


def _leave_one_out(num_samples: int) -> float:
    return num_samples / max(1, num_samples - 1)


def reward_advantages(groups: list[list[Trajectory]]) -> list[list[float]]:
    """The reward itself, for a critic-free PPO that normalizes over the batch afterwards.

        A = reward

    With gamma = lambda = 1 and no critic every token's return is the reward of its trajectory.

    Source: AReaL v0.1 and v0.2; REINFORCE++, arXiv:2501.03262.
    """
    return [[trajectory.reward for trajectory in group] for group in groups]


def token_rewards(groups: list[list[Trajectory]]) -> list[list[list[float]]]:
    """One reward for each token: that of the trajectory at its last sampled token, 0 elsewhere.

        r(t) = reward at the last sampled token, else 0

    What `gae` starts from. Step rewards, where there are any, stand where their steps end, and the
    reward of the whole then counts only as far as it is among them.

    Source: the terminal reward of PPO for language models, InstructGPT, arXiv:2203.02155.
    """
    return [[_token_rewards(trajectory) for trajectory in group] for group in groups]


def _token_rewards(trajectory: Trajectory) -> list[float]:
    rewards = [0.0] * len(trajectory.token_ids)
    last = _last_sampled([trajectory])
    for place, reward in trajectory.step_rewards or ((last, trajectory.reward),):
        rewards[place] = reward
    return rewards


def batch_normalized(
    advantages: list[list[float]],
    groups: list[list[Trajectory]],
    *,
    over: Literal["tokens", "trajectories"],
    sum_over_ranks: SumOverRanks,
    is_centered: bool = True,
) -> list[list[float]]:
    """Advantages less their mean, over their sample standard deviation plus 1e-6, in all the batch.

        A = (a - mean) / (std + 1e-6)

    A batch in which all are equal gets zeros. A collective of all ranks.

    Args:
        advantages: one per trajectory, like groups.
        over: what mean and deviation are taken over. `tokens`: each counts as often as its
            trajectory has sampled tokens; so long responses weigh more.
        sum_over_ranks: `dist.sum`.
        is_centered: subtract the mean; after `group_advantages` it is 0 over trajectories.

    Source: over tokens, AReaL v0.1 to v0.3 and REINFORCE++, arXiv:2501.03262; over trajectories
    after the mean of each group, LitePPO, arXiv:2508.08221.
    """
    if over not in ("tokens", "trajectories"):
        raise ConfigError(f"over={over!r} must be 'tokens' or 'trajectories'.")
    counts = [t.response_length if over == "tokens" else 1 for group in groups for t in group]
    pairs = list(zip(chain.from_iterable(advantages), counts, strict=True))
    values, times = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    mean, std = mean_and_std(values, times, sum_over_ranks=sum_over_ranks)
    if std == 0:
        return [[0.0] * len(group) for group in advantages]
    shift = mean if is_centered else 0.0
    return [[(value - shift) / (std + STD_EPS) for value in group] for group in advantages]


def mean_and_std(
    values: torch.Tensor, counts: torch.Tensor, *, sum_over_ranks: SumOverRanks
) -> tuple[float, float]:
    """Mean and sample standard deviation of numbers that count several times, over all ranks.

        mean = sum(n x) / sum(n),   std = sqrt(sum(n (x - mean)^2) / (sum(n) - 1))

    Exactly 0 is the deviation of fewer than two, and where only rounding tells them apart. A
    collective of all ranks.

    Args:
        values: [K] of this rank; K may differ from rank to rank, and be 0.
        counts: [K] how often each counts; 0 or more.
        sum_over_ranks: `dist.sum`.
    """
    numbers, times = values.double(), counts.double()
    total, count = sum_over_ranks([float((times * numbers).sum()), float(times.sum())])
    mean = total / count if count else 0.0
    [squares] = sum_over_ranks([float((times * (numbers - mean) ** 2).sum())])
    std = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
    only_rounding = max(EQUAL, 10 * torch.finfo(values.dtype).eps) * abs(mean)
    return mean, 0.0 if std <= only_rounding else std


def step_advantages(
    groups: list[list[Trajectory]], *, divide_by_std: bool = False
) -> list[list[list[float]]]:
    """One advantage for each token of each trajectory: the centered rewards of what it led to.

        A(t) = sum of (r(k) - mean) over the steps k that end at t or later

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
    if not rewards:
        return []
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
