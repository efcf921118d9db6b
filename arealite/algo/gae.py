"""Generalized advantage estimation on packed sequences: values of a critic to advantages.

T packed tokens, N trajectories, K actions in all of them. An action is a token that the policy
sampled. Index t holds facts about token t.
"""

import torch

from arealite.algo.advantages import STD_EPS, SumOverRanks, mean_and_std
from arealite.errors import ConfigError


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    end_values: torch.Tensor | None = None,
    is_truncated: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both [T] in the dtype of `values`; 0 where no action is.

    Over the actions 1..n of each trajectory, with V(n+1) = `end_values` if truncated, else 0:

        delta(i) = r(i) + gamma V(i+1) - V(i)
        A(i)     = delta(i) + gamma lambda A(i+1),   return(i) = A(i) + V(i)

    Tokens between actions (prompts, tools, environments) take no time: nothing decays over them.
    Returns are the critic's target, from advantages that are not normalized. gamma = lambda = 1
    with values of 0 gives the sum of the rewards to come.

    Args:
        rewards: [T] of a turn or of the whole trajectory, at any token: each counts for the last
            action at or before it. One before the first action is no action's doing and is lost.
        values: [T] what the critic expects before it sees token t; read at actions only.
        loss_mask: [T] bool, True where the policy sampled the token.
        cu_seqlens: [N + 1] starts at 0 and ends at T.
        gamma: discount per action, from 0 to 1.
        gae_lambda: 0 trusts the critic after one action, 1 only the rewards.
        end_values: [N] what the critic expects behind the last token. Without it, and where
            `is_truncated` is False, nothing is to come.
        is_truncated: [N] bool, True where a limit and not the policy ended the trajectory.

    Source: arXiv:1506.02438 equations 11 to 16.
    """
    _check_tokens(rewards, values, loss_mask, cu_seqlens)
    _check_ends(end_values, is_truncated, len(cu_seqlens) - 1)
    _check_discounts(gamma, gae_lambda)
    with torch.no_grad():
        actions = loss_mask.nonzero()[:, 0]
        num_done = torch.cat([loss_mask.new_zeros(1), loss_mask.cumsum(0)])
        bounds = num_done[cu_seqlens.long()]  # [N + 1] of the trajectories within the K actions
        is_last = torch.zeros_like(actions, dtype=torch.bool)
        has_action = bounds.diff() > 0
        is_last[bounds[1:][has_action] - 1] = True

        value = values[actions].double()
        reward = _credited(rewards, num_done[1:], bounds, cu_seqlens, len(actions))
        next_value = value.roll(-1).masked_fill(is_last, 0.0)
        if end_values is not None and is_truncated is not None:
            ends = torch.where(is_truncated, end_values.double(), 0.0)
            next_value[is_last] = ends[has_action]
        delta = reward + gamma * next_value - value
        decay = torch.full_like(delta, gamma * gae_lambda).masked_fill(is_last, 0.0)
        advantage = _suffix_sums(delta, decay, int(bounds.diff().max()) if len(actions) else 0)

        advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
        advantages[actions] = advantage.to(values.dtype)
        returns[actions] = (advantage + value).to(values.dtype)
        return advantages, returns


def normalized(
    advantages: list[torch.Tensor],
    loss_masks: list[torch.Tensor],
    *,
    sum_over_ranks: SumOverRanks,
) -> list[torch.Tensor]:
    """Advantages less their mean, over their sample standard deviation plus 1e-6; 0 elsewhere.

        A = (a - mean) / (std + 1e-6)

    Over all sampled tokens of all micro-batches of all ranks; zeros if all are equal. A collective.

    Args:
        advantages: [T] of each micro-batch.
        loss_masks: [T] bool of each, True where the policy sampled the token.
        sum_over_ranks: `dist.sum`.

    Source: arXiv:2006.05990 (choice C67); AReaL, arXiv:2505.24298.
    """
    pairs = [(each.detach(), mask) for each, mask in zip(advantages, loss_masks, strict=True)]
    sampled = torch.cat([advantage[mask] for advantage, mask in pairs] or [torch.empty(0)])
    mean, std = mean_and_std(sampled, torch.ones_like(sampled), sum_over_ranks=sum_over_ranks)
    if std == 0:
        return [torch.zeros_like(advantage) for advantage, _ in pairs]
    return [
        torch.where(mask, (advantage - mean) / (std + STD_EPS), 0.0) for advantage, mask in pairs
    ]


def _credited(
    rewards: torch.Tensor,
    num_done: torch.Tensor,
    bounds: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_actions: int,
) -> torch.Tensor:
    """[K] float64 rewards of each action: all from its token to the next action of its trajectory.

    Args:
        num_done: [T] actions at or before each token, in all trajectories together.
    """
    num_before = bounds[:-1].repeat_interleave(cu_seqlens.diff().long())
    has_action = num_done > num_before
    credited = rewards.new_zeros(num_actions, dtype=torch.float64)
    return credited.index_add_(0, num_done[has_action] - 1, rewards[has_action].double())


def _suffix_sums(values: torch.Tensor, decay: torch.Tensor, longest: int) -> torch.Tensor:
    """sums[k] = values[k] + decay[k] sums[k + 1], by doubling the number of summands.

    After each round sums[k] covers `reach` summands and factors[k] is the product of their decays.
    A decay of 0 ends a trajectory, the last one too, so that none needs more than `longest`.
    """
    sums, factors, reach = values.clone(), decay.clone(), 1
    while reach < longest:
        # Not factor * sum alone: 0 * nan would reach into the trajectory before.
        is_over = factors[:-reach] == 0
        sums[:-reach] += (factors[:-reach] * sums[reach:]).masked_fill(is_over, 0.0)
        factors[:-reach] *= factors[reach:].clone()
        reach *= 2
    return sums


def _check_tokens(
    rewards: torch.Tensor, values: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    num_tokens = len(loss_mask)
    for name, tensor in {"rewards": rewards, "values": values, "loss_mask": loss_mask}.items():
        if tensor.shape != (num_tokens,):
            raise ConfigError(
                f"{name} has shape {list(tensor.shape)} for {num_tokens} tokens of loss_mask. "
                "Pass one number per packed token; a reward of a trajectory goes to its last one."
            )
    if loss_mask.dtype != torch.bool:
        raise ConfigError(f"loss_mask is {loss_mask.dtype}, not torch.bool. Pass mb.loss_mask.")
    ends = cu_seqlens.tolist()
    if cu_seqlens.dim() != 1 or not ends or ends[0] != 0 or ends[-1] != num_tokens or _falls(ends):
        raise ConfigError(
            f"cu_seqlens {ends[:8]} does not rise from 0 to the {num_tokens} tokens of loss_mask. "
            "Pass that of the same micro-batch."
        )


def _falls(bounds: list[int]) -> bool:
    return bounds != sorted(bounds)


def _check_ends(
    end_values: torch.Tensor | None, is_truncated: torch.Tensor | None, num_trajectories: int
) -> None:
    if end_values is None and is_truncated is None:
        return
    for name, tensor in {"end_values": end_values, "is_truncated": is_truncated}.items():
        shape = None if tensor is None else list(tensor.shape)
        if shape != [num_trajectories]:
            raise ConfigError(
                f"{name} has shape {shape} for {num_trajectories} trajectories. Pass end_values "
                "and is_truncated together, one of each per trajectory, or neither."
            )


def _check_discounts(gamma: float, gae_lambda: float) -> None:
    for name, value in {"gamma": gamma, "gae_lambda": gae_lambda}.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} must be between 0 and 1.")
