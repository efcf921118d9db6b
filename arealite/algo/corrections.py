"""What to do about tokens that another policy sampled than the one at the start of the step.

The *behavior* policy sampled a token: older weights, or another engine's arithmetic. The *proximal*
policy is the trainer's at the start of the step. Weights multiply the surrogate of a token; what is
left out of a loss stays in its denominator. T packed tokens, N sequences.
"""

import math
from collections.abc import Callable
from itertools import chain
from typing import Literal

import torch

from arealite.algo.losses import (
    MAX_LOG_RATIO,
    importance_weight,
    mean_of_sequence,
    sum_of_sequence,
)
from arealite.errors import ConfigError

GatherOverRanks = Callable[[list[torch.Tensor]], list[list[torch.Tensor]]]
"""The lists of all ranks, on each of them: `arealite.dist.gather`."""


def truncated_weight(
    proximal_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    cap: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(proximal / behavior, cap) [T] without gradient, and where the cap acts [T] bool.

        weight = min(proximal / behavior, cap)

    Every token stays in the loss. `losses.importance_weight` leaves those above the cap out.

    Source: TIS, https://fengyao.notion.site/off-policy-rl; its cap is 2.
    """
    _check_above("cap", cap, 0)
    weight, _ = importance_weight(proximal_logprobs, behavior_logprobs, loss_mask, cap=math.inf)
    return weight.clamp(max=cap), weight > cap


def banded_weight(
    proximal_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    low: float = 0.5,
    high: float = 5.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """proximal / behavior [T] without gradient, 0 outside of [low, high], and where that is.

        weight = proximal / behavior if low <= it <= high, else 0

    Source: IcePop, arXiv:2510.18855.
    """
    _check_above("high", high, low)
    weight, _ = importance_weight(proximal_logprobs, behavior_logprobs, loss_mask, cap=math.inf)
    dropped = loss_mask & ((weight < low) | (weight > high))
    return weight.masked_fill(dropped, 0.0), dropped


def sequence_dropped(
    proximal_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    low: float,
    high: float,
    is_geometric: bool,
) -> torch.Tensor:
    """[T] bool: tokens of sequences whose ratio proximal / behavior is outside of [low, high].

        ratio = exp(sum or mean over the sequence of log(proximal / behavior))

    Args:
        is_geometric: the ratio is the geometric mean of those of its tokens, of which .99 to 1.01
            is a usual band; otherwise their product, of which 0 to 2 is.

    Source: MIS and its geometric form, Liu, Li et al., "When Speed Kills Stability", 2025.
    """
    _check_above("high", high, low)
    with torch.no_grad():
        gap = proximal_logprobs - behavior_logprobs
        over_sequence = mean_of_sequence if is_geometric else sum_of_sequence
        ratio = over_sequence(gap, loss_mask, cu_seqlens).exp()
        return loss_mask & ((ratio < low) | (ratio > high))


def k3_dropped(
    proximal_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    limit: float = 0.01,
    over: Literal["token", "sequence"] = "sequence",
) -> torch.Tensor:
    """[T] bool: tokens that are too unlikely to be those of the proximal policy, by k3.

        k3 = ratio - 1 - log(ratio),   ratio = proximal / behavior;   dropped: k3 > limit

    On average k3 is KL(behavior || proximal), and it is never below 0: unlike a band around the
    ratio it has one limit, and gaps up and down do not cancel in a sequence.

    Args:
        cu_seqlens: [N + 1] starts at 0 and ends at T.
        limit: above 0; .001 to .1 for sequences.
        over: `sequence`: its mean over a sequence decides on all of its tokens; `token`: each one's
            own decides.

    Source: rollout correction of verl, `seq_mean_k3` and `token_k3`, after Liu, Li et al., "When
    Speed Kills Stability", 2025; k3, http://joschu.net/blog/kl-approx.html.
    """
    _check_above("limit", limit, 0)
    if over not in ("token", "sequence"):
        raise ConfigError(f"over={over!r} must be 'token' or 'sequence'.")
    with torch.no_grad():
        gap = (proximal_logprobs - behavior_logprobs).clamp(max=MAX_LOG_RATIO)
        k3 = gap.expm1() - gap
        if over == "sequence":
            k3 = mean_of_sequence(k3, loss_mask, cu_seqlens)
        return loss_mask & (k3 > limit)


def second_moment_dropped(
    proximal_logprobs: list[torch.Tensor],
    behavior_logprobs: list[torch.Tensor],
    loss_masks: list[torch.Tensor],
    *,
    limit: float = 0.04,
    gather_over_ranks: GatherOverRanks,
) -> list[torch.Tensor]:
    """Which tokens to leave out so that the mean of (behavior - proximal)^2 is below `limit`.

        mean over what stays of log(behavior / proximal)^2 < limit

    The largest leave first, and as few as can be. All micro-batches of a minibatch are looked at
    together, those of all ranks too: cut in another way, the same tokens are dropped. A collective.

    Args:
        proximal_logprobs, behavior_logprobs, loss_masks: [T] of each micro-batch of this rank.
        gather_over_ranks: `dist.gather`.

    Source: M2PO, arXiv:2510.01161.
    """
    _check_above("limit", limit, 0)
    squares = [
        (behavior - proximal).double() ** 2
        for proximal, behavior in zip(proximal_logprobs, behavior_logprobs, strict=True)
    ]
    sampled = [square[mask].cpu() for square, mask in zip(squares, loss_masks, strict=True)]
    everywhere = chain.from_iterable(gather_over_ranks(sampled))
    ordered = torch.cat([torch.empty(0), *everywhere]).sort().values
    means = ordered.cumsum(0) / torch.ones_like(ordered).cumsum(0)
    num_kept = int((means < limit).sum())  # the means rise with what is added
    if num_kept == len(ordered):
        return [torch.zeros_like(mask) for mask in loss_masks]
    return [
        mask & (square >= ordered[num_kept].to(square.device))
        for square, mask in zip(squares, loss_masks, strict=True)
    ]


def interpolated_proximal(
    logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    versions: torch.Tensor,
    loss_mask: torch.Tensor,
    version: int,
) -> torch.Tensor:
    """Proximal log-probs [T] without a forward pass: between behavior and current, by their age.

        log proximal = log behavior + (age - 1) / age * log(current / behavior)

    The age is `version` less that of the weights that sampled a token. Tokens of the newest
    weights, or of unknown ones, keep the log-prob of behavior.

    Args:
        logprobs: [T] current; no gradient goes through them here.
        versions: [T] of the weights that sampled each token.
        version: of the weights that are being trained.

    Source: A-3PO, arXiv:2512.06547.
    """
    age = (version - versions).to(behavior_logprobs.dtype)
    is_older = loss_mask & (versions >= 0) & (age > 0)
    nearer = (age - 1) / age * (logprobs.detach() - behavior_logprobs)
    return behavior_logprobs + torch.where(is_older, nearer, 0.0)


def _check_above(name: str, value: float, limit: float) -> None:
    if not value > limit:
        raise ConfigError(f"{name}={value} must be above {limit}.")
