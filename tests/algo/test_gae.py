from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arealite.algo.gae import gae, normalized
from arealite.errors import ConfigError

# Computed outside of this project, for gamma .9 and lambda .8.
VALUES, REWARDS = [0.1, 0.2, 0.4, 0.5], [0.0, 0.0, 0.0, 1.0]
ADVANTAGES, RETURNS = [0.407744, 0.4552, 0.41, 0.5], [0.507744, 0.6552, 0.81, 1.0]
RATES = {"gamma": 0.9, "gae_lambda": 0.8}


def by_definition(
    rewards: list[float],
    values: list[float],
    mask: list[bool],
    end: float,
    gamma: float,
    lam: float,
) -> list[float]:
    """Advantages [L] of one trajectory: for each action the sum over all later ones, O(n^2)."""
    actions = [t for t, is_action in enumerate(mask) if is_action]
    credited = [
        sum(rewards[start:stop]) for start, stop in pairwise([*actions, len(mask)])
    ]  # from each action up to the next
    critic = [*(values[t] for t in actions), end]
    deltas = [r + gamma * critic[i + 1] - critic[i] for i, r in enumerate(credited)]
    found = [0.0] * len(mask)
    for i, t in enumerate(actions):
        found[t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(actions)))
    return found


def packed(*trajectories: list[tuple[float, float, bool]]) -> list[torch.Tensor]:
    """Rewards, values, mask and cu_seqlens of trajectories of (reward, value, is_action)."""
    tokens = [token for trajectory in trajectories for token in trajectory]
    rewards, values, mask = zip(*tokens, strict=True) if tokens else ((), (), ())
    ends = torch.tensor([0, *(len(t) for t in trajectories)]).cumsum(0)
    return [
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(mask, dtype=torch.bool),
        ends.int(),
    ]


NUMBER = st.floats(-3, 3, allow_subnormal=False)
TRAJECTORY = st.lists(st.tuples(NUMBER, NUMBER, st.booleans()), max_size=12)
EXAMPLE = [(reward, value, True) for reward, value in zip(REWARDS, VALUES, strict=True)]


def test_four_actions_give_the_values_computed_outside_of_this_project():
    advantages, returns = gae(*packed(EXAMPLE), **RATES)
    assert advantages.tolist() == pytest.approx(ADVANTAGES, abs=1e-12)
    assert returns.tolist() == pytest.approx(RETURNS, abs=1e-12)


@given(
    trajectories=st.lists(TRAJECTORY, max_size=5),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    data=st.data(),
)
def test_any_trajectories_give_what_the_definition_says(
    trajectories: list[list[tuple[float, float, bool]]],
    gamma: float,
    lam: float,
    data: st.DataObject,
):
    count = len(trajectories)
    ends = data.draw(st.lists(NUMBER, min_size=count, max_size=count))
    truncated = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    tensors = packed(*trajectories)
    advantages, returns = gae(
        *tensors,
        gamma=gamma,
        gae_lambda=lam,
        end_values=torch.tensor(ends, dtype=torch.float64),
        is_truncated=torch.tensor(truncated, dtype=torch.bool),
    )
    expected: list[float] = []
    for trajectory, end, is_truncated in zip(trajectories, ends, truncated, strict=True):
        columns = [list(column) for column in zip(*trajectory, strict=True)] or [[], [], []]
        expected += by_definition(*columns, end if is_truncated else 0.0, gamma, lam)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-9)
    with_values = torch.tensor(expected, dtype=torch.float64) + tensors[1] * tensors[2]
    assert returns.tolist() == pytest.approx(with_values.tolist(), abs=1e-9)


def test_without_critic_and_decay_an_advantage_is_the_sum_of_the_rewards_to_come():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    advantages, returns = gae(
        rewards, torch.zeros(5), torch.ones(5).bool(), torch.tensor([0, 3, 5])
    )
    assert advantages.tolist() == returns.tolist() == [7, 6, 4, 24, 16]


@given(st.lists(st.integers(0, 3), min_size=5, max_size=5), st.lists(TRAJECTORY, max_size=3))
def test_masked_tokens_and_neighbours_change_nothing(
    gaps: list[int], others: list[list[tuple[float, float, bool]]]
):
    filler = (0.0, 9.0, False)
    spread = [filler] * gaps[0]
    for token, gap in zip(EXAMPLE, gaps[1:], strict=True):
        spread += [token, *[filler] * gap]
    place = sum(len(other) for other in others)
    advantages, returns = gae(*packed(*others, spread, *others), **RATES)
    inside = slice(place, place + len(spread))
    is_action = torch.tensor([action for _, _, action in spread])
    assert advantages[inside][is_action].tolist() == pytest.approx(ADVANTAGES, abs=1e-12)
    assert returns[inside][is_action].tolist() == pytest.approx(RETURNS, abs=1e-12)
    assert not advantages[inside][~is_action].any()
    assert not returns[inside][~is_action].any()


def test_a_reward_counts_for_the_last_action_at_or_before_it():
    trajectory = [
        (100.0, 0.0, False),  # before any action: lost
        (0.0, 0.0, True),
        (1.0, 0.0, False),
        (2.0, 0.0, False),
        (4.0, 0.0, True),
        (8.0, 0.0, False),
    ]
    advantages, _ = gae(*packed(trajectory, trajectory), gamma=0.0)
    assert advantages.tolist() == [0, 3, 0, 0, 12, 0] * 2


def test_the_end_is_valued_only_where_a_limit_cut_it_off():
    trajectory = [(0.0, 1.0, True), (0.0, 2.0, True)]
    ends = {"end_values": torch.tensor([10.0, 10.0]), "is_truncated": torch.tensor([False, True])}
    advantages, returns = gae(*packed(trajectory, trajectory), gamma=0.5, gae_lambda=0.0, **ends)
    assert advantages.tolist() == [0, -2, 0, 3]
    assert returns.tolist() == [1, 0, 1, 5]


def test_a_trajectory_without_any_action_gets_zeros():
    silent = [(5.0, 1.0, False)] * 3
    ends = {"end_values": torch.ones(4), "is_truncated": torch.ones(4).bool()}
    advantages, returns = gae(*packed(silent, [], EXAMPLE, silent), **ends)
    assert not advantages[:3].any()
    assert not advantages[-3:].any()
    assert not returns[:3].any()
    assert advantages[3:7].all()


def test_no_trajectories_give_nothing():
    advantages, returns = gae(*packed())
    assert advantages.shape == returns.shape == (0,)


def test_a_nan_stays_in_its_own_trajectory():
    broken = [(float("nan"), 0.0, True)] * 3
    advantages, _ = gae(*packed(EXAMPLE, broken, EXAMPLE), **RATES)
    assert advantages[4:7].isnan().all()
    assert advantages[:4].tolist() == advantages[7:].tolist() == pytest.approx(ADVANTAGES)


def test_advantages_have_the_dtype_of_the_values_and_no_gradient():
    rewards, values, mask, ends = packed(EXAMPLE)
    advantages, returns = gae(rewards, values.float().requires_grad_(), mask, ends)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.zeros(3)}, r"rewards has shape \[3\] for 4 tokens"),
        ({"values": torch.zeros(4, 1)}, r"values has shape \[4, 1\]"),
        ({"loss_mask": torch.ones(4)}, "not torch.bool"),
        ({"loss_mask": torch.ones(4, 1).bool()}, r"^loss_mask has shape \[4, 1\] for 4 tokens"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens \[0, 3\]"),
        ({"cu_seqlens": torch.tensor([1, 4])}, "does not rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "does not rise"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "does not rise"),
        ({"end_values": torch.zeros(1)}, "is_truncated has shape None for 1 trajectories"),
        ({"is_truncated": torch.ones(1).bool()}, "end_values has shape None"),
        (
            {"end_values": torch.zeros(2), "is_truncated": torch.ones(1).bool()},
            r"end_values has shape \[2\] for 1",
        ),
        ({"gamma": 1.01}, "gamma=1.01"),
        ({"gae_lambda": float("nan")}, "gae_lambda=nan"),
    ],
)
def test_what_does_not_fit_together_is_named(changes: dict[str, torch.Tensor], message: str):
    names = ("rewards", "values", "loss_mask", "cu_seqlens")
    arguments = dict(zip(names, packed(EXAMPLE), strict=True))
    with pytest.raises(ConfigError, match=message):
        gae(**{**arguments, **changes})


def test_normalized_advantages_have_mean_zero_and_deviation_one_over_all_micro_batches():
    advantages = [torch.tensor([1.0, 9.0, 2.0]), torch.tensor([6.0, 50.0])]
    masks = [torch.tensor([True, False, True]), torch.tensor([True, False])]
    first, second = normalized(advantages, masks, sum_over_ranks=list)
    std = 7**0.5  # of 1, 2 and 6: mean 3, squares 4 + 1 + 9 over 2
    assert first.tolist() == pytest.approx([-2 / std, 0.0, -1 / std], abs=1e-5)
    assert second.tolist() == pytest.approx([3 / std, 0.0], abs=1e-5)


def test_equal_advantages_and_none_normalize_to_zero():
    ones, mask = torch.ones(3), torch.tensor([True, True, False])
    assert normalized([ones], [mask], sum_over_ranks=list)[0].tolist() == [0.0] * 3
    assert normalized([], [], sum_over_ranks=list) == []
    assert normalized([ones], [~mask], sum_over_ranks=list)[0].tolist() == [0.0] * 3


def test_advantages_that_only_rounding_tells_apart_normalize_to_exactly_zero():
    nearly = torch.tensor([0.1, 0.1, 0.1]) + torch.tensor([0.0, 1e-8, -1e-8])
    assert len(set(nearly.tolist())) > 1
    mask = torch.ones(3).bool()
    assert normalized([nearly], [mask], sum_over_ranks=list)[0].tolist() == [0.0] * 3


def test_lambda_zero_is_the_error_of_one_step_and_lambda_one_the_return_less_the_value():
    rewards, values = [1.0, 2.0, 4.0], [0.5, 0.25, 3.0]
    tensors = packed([(r, v, True) for r, v in zip(rewards, values, strict=True)])
    one_step, _ = gae(*tensors, gamma=0.5, gae_lambda=0.0)
    assert one_step.tolist() == [1 + 0.125 - 0.5, 2 + 1.5 - 0.25, 4 - 3.0]
    to_the_end, returns = gae(*tensors, gamma=0.5, gae_lambda=1.0)
    assert returns.tolist() == [1 + 1 + 1, 2 + 2, 4.0]
    assert to_the_end.tolist() == [3 - 0.5, 4 - 0.25, 4 - 3.0]


def test_ranks_normalize_over_all_that_they_sampled_together():
    mine, mask = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2).bool()
    # The other rank has 6 and 7: together a sum of 16 over 4, and squares of 9 + 4 and 4 + 9.
    others = iter([[13.0, 2.0], [13.0]])
    [found] = normalized(
        [mine],
        [mask],
        sum_over_ranks=lambda own: [a + b for a, b in zip(own, next(others), strict=True)],
    )
    std = (26 / 3) ** 0.5
    assert found.tolist() == pytest.approx([-3 / std, -2 / std], abs=1e-5)
    assert not found.requires_grad


def test_no_micro_batch_is_normalized_without_its_mask():
    with pytest.raises(ValueError, match="zip"):
        normalized([torch.ones(2)] * 2, [torch.ones(2).bool()], sum_over_ranks=list)


def test_a_rank_without_micro_batches_adds_nothing_to_what_the_others_normalize_by():
    told: list[list[float]] = []
    normalized([], [], sum_over_ranks=lambda own: told.append(list(own)) or list(own))
    assert told == [[0.0, 0.0], [0.0]]
