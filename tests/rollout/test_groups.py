"""What a workflow may return: fields that fit together, and nothing else."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch

from arealite.observe.metrics import rollout_metrics
from arealite.rollout.groups import check_group, flattened, problem_with
from arealite.rollout.witness import Witness
from arealite.types import OWN_METRICS, Trajectory


class Nobody:
    """A witness that has nothing against what it did not see."""

    version = 5

    def problem_with(self, trajectory: Trajectory) -> str:
        return ""


def checked(group: list[Trajectory]) -> list[Trajectory]:
    return check_group(group, "Agent", cast(Witness, Nobody()))


GOOD = Trajectory(
    token_ids=[1, 2, 3],
    loss_mask=[False, True, True],
    behavior_logprobs=[0.0, -1.0, -2.0],
    versions=[-1, 4, 5],
    reward=1.0,
    raw_reward=0.5,
    step_rewards=((1, 0.5), (2, 1.0)),
    metrics={"turns": 1.0, "reward_turn_1": 0},
    temperature=1.0,
    finish_reason="stop",
)


def test_a_good_trajectory_has_no_problem():
    assert problem_with(GOOD, version=5) == ""
    assert problem_with(GOOD, version=4) == ""  # an update to version 5 is under way


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"loss_mask": [False, True]}, "2 loss_mask for 3 tokens"),
        ({"loss_mask": [False] * 3}, "begins with a sampled token or has none"),
        ({"loss_mask": [True] * 3}, "begins with a sampled token or has none"),
        ({"behavior_logprobs": [0.0, -1.0, math.nan]}, "a behavior log-prob that is not finite"),
        ({"versions": [-1, 4, 7]}, r"versions \[4, 7\], the engine being at 5"),
        ({"reward": "1"}, "the reward '1', which is not a finite number"),
        ({"reward": math.inf}, "the reward inf"),
        ({"raw_reward": math.nan}, "the raw reward nan"),
        ({"step_rewards": ((1, None),)}, "the step reward None"),
        ({"step_rewards": ((0, 1.0),)}, "ends with token 0, which is not a sampled one"),
        ({"step_rewards": ((3, 1.0),)}, "ends with token 3, which is not a sampled one"),
        ({"metrics": {"moves": None}}, "the metric moves=None, which is not a finite number"),
        ({"metrics": {"moves": torch.ones(2)}}, r"the metric moves=tensor\(\[1., 1.\]\)"),
        ({"metrics": {"reward": 1.0}}, "'reward', which is what every run logs as `rollout/rew"),
        ({"metrics": {"staleness_share_0": 1.0}}, "'staleness_share_0', which is what every run"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], problem: str):
    with pytest.raises(AssertionError, match=problem):
        assert not problem_with(replace(GOOD, **change), version=5)


def test_no_metric_of_an_episode_can_hide_one_of_the_run():
    names = {name.removeprefix("rollout/") for name in rollout_metrics([[GOOD]], 5)}
    own = {name for name in names if "/" not in name} - {*GOOD.metrics}
    by_age = {name for name in own if name.startswith(OWN_METRICS[-2:])}
    assert own - by_age == set(OWN_METRICS[:-2])
    assert by_age


def test_parts_of_a_conversation_are_laid_out_in_order_and_share_a_sample():
    first, second = replace(GOOD, reward=0.1), replace(GOOD, reward=0.2)
    group = checked([replace(GOOD, earlier=(first, second)), GOOD])
    assert [(each.reward, each.sample) for each in group] == [
        (0.1, 0),
        (0.2, 0),
        (1.0, 0),
        (1.0, 1),
    ]
    assert not any(each.earlier for each in group)


def test_groups_that_a_workflow_puts_together_stay_apart():
    groups = [flattened([replace(GOOD, earlier=(GOOD,)), GOOD]) for _ in range(2)]
    assert [each.sample for each in checked(groups[0] + groups[1])] == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "number", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)]
)
def test_numbers_of_any_kind_are_those_of_python_afterwards(number: Any):
    given = replace(
        GOOD, reward=number, raw_reward=number, step_rewards=((1, number),), metrics={"m": number}
    )
    [found] = checked([given])
    numbers = [found.reward, found.raw_reward, found.step_rewards[0][1], found.metrics["m"]]
    assert numbers == [0.5] * 4
    assert {type(each) for each in numbers} == {float}
    [truth] = checked([replace(GOOD, metrics={"is_found": np.True_})])
    assert truth.metrics == {"is_found": 1.0}
