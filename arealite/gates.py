"""Do server and trainer compute the same log-probs? If not, nothing that follows means anything."""

import torch

from arealite import dist
from arealite.api import TrainEngine
from arealite.training.packing import attach, pack
from arealite.types import MicroBatch, Trajectory


def logprob_gap(minibatches: list[list[MicroBatch]], version: int) -> dict[str, float]:
    """Mean and greatest |server - trainer| log-prob over tokens sampled with `version`.

    Both sides used the same weights for these tokens, so only rounding may differ. Empty where no
    token is that young. A collective.

    Args:
        minibatches: with `proximal_logprobs` attached, computed with the weights of `version`.
    """
    gaps = [
        (mb.proximal_logprobs - mb.behavior_logprobs).abs()[mb.versions == version]
        for minibatch in minibatches
        for mb in minibatch
    ]
    gap = torch.cat([*gaps, torch.empty(0)]).double()
    total, count = dist.sum([float(gap.sum()), gap.numel()])
    if not count:
        return {}
    greatest = max(dist.gather(float(gap.max()) if gap.numel() else 0.0))
    return {"gate/logprob_gap_mean": total / count, "gate/logprob_gap_max": greatest}


def fresh_logprob_gap(
    train_engine: TrainEngine, groups: list[list[Trajectory]], version: int, *, max_tokens: int
) -> dict[str, float]:
    """`logprob_gap` of trajectories just sampled, such as those of an evaluation. A collective.

    Rollouts that wait until they are trained on are older than the weights they meet, so that a
    batch may have no token of its own version; these do.

    Args:
        max_tokens: tokens in one forward pass.
    """
    minibatches = pack(
        groups,
        [[0.0] * len(group) for group in groups],
        num_minibatches=1,
        max_tokens=max_tokens,
        aggregation="token",
    )
    scored = [attach(mbs, proximal_logprobs=train_engine.logprobs(mbs)) for mbs in minibatches]
    return logprob_gap(scored, version)
