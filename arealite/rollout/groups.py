"""What a workflow returns, before anything is trained on it: one list, whose fields fit together.

Each trajectory is looked at alone, and beside what the engine says it has sampled.
"""

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import SupportsFloat

from arealite.errors import TrajectoryError
from arealite.rollout.witness import Witness
from arealite.types import OWN_METRICS, Trajectory

_next_sample = itertools.count()


def flattened(samples: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories of a group, with the earlier parts of each conversation before its last."""
    parts: list[Trajectory] = []
    for sample in samples:
        if not isinstance(sample, Trajectory):  # `check_group` names it
            parts.append(sample)
            continue
        number = sample.sample if sample.sample >= 0 else next(_next_sample)
        parts += [replace(part, sample=number, earlier=()) for part in (*sample.earlier, sample)]
    return parts


def check_group(group: list[Trajectory], workflow: str, witness: Witness) -> list[Trajectory]:
    """What a workflow returned, if it is a group of which the engine sampled what it says.

    Args:
        workflow: its name, for the error.

    Raises:
        TrajectoryError: naming the workflow and the field.
    """
    name = f"{workflow}.arun_episode"
    items = group if isinstance(group, list | tuple) else [group]
    if any(map(inspect.isawaitable, items)):
        raise TrajectoryError(f"{name} returned a coroutine. Put `await` before what it calls.")
    strangers = [item for item in items if not isinstance(item, Trajectory)]
    if items is not group or not group or strangers:
        is_list = items is group and strangers
        what = f"a list with {strangers[0]!r:.80}" if is_list else f"{group!r:.80}"
        raise TrajectoryError(
            f"{name} returned {what}. Return a list of Trajectory, or None to reject the row."
        )
    group = flattened(group)
    for trajectory in group:
        if problem := problem_with(trajectory, witness.version):
            raise TrajectoryError(f"{name} returned {problem}.")
        if problem := witness.problem_with(trajectory):
            raise TrajectoryError(
                f"{name} returned {problem}. Build trajectories with Transcript, which keeps "
                "tokens, masks, log-probs and versions aligned."
            )
    numbers = {
        sample: number for number, sample in enumerate(dict.fromkeys(t.sample for t in group))
    }
    return [_with_floats(trajectory, numbers[trajectory.sample]) for trajectory in group]


def _with_floats(trajectory: Trajectory, sample: int) -> Trajectory:
    """With numbers of Python, whatever numbers the workflow had."""
    raw = trajectory.raw_reward
    return replace(
        trajectory,
        sample=sample,
        reward=float(trajectory.reward),
        raw_reward=None if raw is None else float(raw),
        step_rewards=tuple((int(end), float(step)) for end, step in trajectory.step_rewards),
        metrics={name: float(value) for name, value in trajectory.metrics.items()},
    )


def problem_with(trajectory: Trajectory, version: int) -> str:
    """What is wrong with the fields of a trajectory; empty if nothing is.

    Args:
        version: of the engine; no token is of weights beyond the update that may be under way.
    """
    return (
        _problem_with_tokens(trajectory, version)
        or _problem_with_rewards(trajectory)
        or _problem_with_metrics(trajectory)
    )


def _problem_with_tokens(trajectory: Trajectory, version: int) -> str:
    length = len(trajectory.token_ids)
    for field in ("loss_mask", "behavior_logprobs", "versions"):
        if len(getattr(trajectory, field)) != length:
            return f"{len(getattr(trajectory, field))} {field} for {length} tokens"
    if not any(trajectory.loss_mask) or trajectory.loss_mask[0]:
        return "a trajectory that begins with a sampled token or has none"
    if not all(map(math.isfinite, trajectory.behavior_logprobs)):
        return "a behavior log-prob that is not finite"
    versions = set(compress(trajectory.versions, trajectory.loss_mask))
    oldest = min(version, 0)  # -1, the weights on disk, only before the first push
    if not oldest <= min(versions) <= max(versions) <= version + 1:
        return f"sampled tokens of the versions {sorted(versions)}, the engine being at {version}"
    return ""


def _problem_with_rewards(trajectory: Trajectory) -> str:
    if not _is_finite(trajectory.reward):
        return f"the reward {trajectory.reward!r:.80}, which is not a finite number"
    if trajectory.raw_reward is not None and not _is_finite(trajectory.raw_reward):
        return f"the raw reward {trajectory.raw_reward!r:.80}, which is not a finite number"
    for place, reward in trajectory.step_rewards:
        if not _is_finite(reward):
            return f"the step reward {reward!r:.80}, which is not a finite number"
        if not 0 <= place < len(trajectory.loss_mask) or not trajectory.loss_mask[place]:
            return f"a step that ends with token {place}, which is not a sampled one"
    return ""


def _problem_with_metrics(trajectory: Trajectory) -> str:
    for name, value in trajectory.metrics.items():
        if not _is_finite(value):
            return f"the metric {name}={value!r:.80}, which is not a finite number"
        if name in OWN_METRICS or name.startswith(OWN_METRICS[-2:]):
            return f"a metric {name!r}, which is what every run logs as `rollout/{name}`"
    return ""


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, SupportsFloat) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):  # such as a tensor of several
        return False
