"""Rewards that say more than right or wrong: groups in, groups with other rewards out.

The reward before any shaping stays in `raw_reward` and is logged beside the shaped one.
"""

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

    It changes nothing where advantages are divided by their deviation.

    Source: AReaL v0.1 and v0.2, which reward 5 and -5.
    """
    return _with_rewards(groups, lambda t: wrong + (right - wrong) * t.reward)


def _with_rewards(groups: Groups, shaped: Callable[[Trajectory], float]) -> Groups:
    return [
        [
            replace(
                trajectory,
                reward=shaped(trajectory),
                raw_reward=(
                    trajectory.reward if trajectory.raw_reward is None else trajectory.raw_reward
                ),
            )
            for trajectory in group
        ]
        for group in groups
    ]
