"""What a critic learns, and how well it knows what it shall predict."""

import math

import torch


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    clip: float | None = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error [T] of a critic, and where the clip stops its gradient [T] bool.

        max((v - return)^2, (clip(v, old - clip, old + clip) - return)^2) / 2

    The clip keeps a value near what the critic said at the start of the step. 0 at tokens that the
    policy did not sample.

    Args:
        values: [T] of the critic that is being trained, with gradient.
        old_values: [T] at the start of the step, without.
        returns: [T] of `gae`.
        clip: in units of the value; None: no clip.

    Source: PPO's code, https://github.com/openai/baselines (ppo2); not in the paper.
    """
    error = torch.where(loss_mask, values - returns, 0.0) ** 2
    if clip is None:
        return error / 2, torch.zeros_like(loss_mask)
    limited = old_values + (values - old_values).clamp(-clip, clip)
    limited_error = torch.where(loss_mask, limited - returns, 0.0) ** 2
    stopped = loss_mask & (limited_error > error)
    return torch.maximum(error, limited_error) / 2, stopped


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, loss_mask: torch.Tensor
) -> float:
    """1 - Var(returns - values) / Var(returns) over sampled tokens; nan if the returns are equal.

        1 - Var(returns - values) / Var(returns)

    1: it knows them; 0: no better than their mean; below: worse.
    """
    sampled = returns[loss_mask].double()
    if not len(sampled) or sampled.min() == sampled.max():
        return math.nan
    left = (sampled - values[loss_mask].double()).var(correction=0)
    return float(1 - left / sampled.var(correction=0))
