"""How far a policy is from a reference model: estimates per token, for a reward or for a loss."""

from typing import Literal

import torch

from arealite.errors import ConfigError

KLEstimator = Literal["k1", "k2", "k3"]
"""k1: d, unbiased, large variance, no use as a loss. k2: d^2 / 2, whose gradient is that of the
divergence. k3: exp(-d) - 1 + d, unbiased and never below 0. d = current - reference."""

MAX_GAP = 10.0


def kl_estimate(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    estimator: KLEstimator,
) -> torch.Tensor:
    """An estimate [T] of KL(current || reference) at sampled tokens; 0 elsewhere.

        k1 = d,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d,   d = log(current / reference)

    Args:
        logprobs: [T] under the current policy; with gradient in a loss, without in a reward.
        ref_logprobs: [T] under the reference model; see `attach`.
        loss_mask: [T] bool, True where the policy sampled the token.

    Raises:
        ConfigError: there are no reference log-probs, or no such estimator.

    Source: http://joschu.net/blog/kl-approx.html; as a loss, GRPO, arXiv:2402.03300 equation 4.
    """
    if ref_logprobs.shape != logprobs.shape:
        raise ConfigError(
            f"A KL needs the log-probs of a reference model: ref_logprobs has "
            f"{ref_logprobs.numel()} values for {logprobs.numel()} tokens. Attach them before the "
            "step: `attach(minibatch, ref_logprobs=...)`."
        )
    gap = torch.where(loss_mask, logprobs - ref_logprobs, 0.0).clamp(-MAX_GAP, MAX_GAP)
    match estimator:
        case "k1":
            return gap
        case "k2":
            return gap**2 / 2
        case "k3":
            return (-gap).exp() - 1 + gap
    raise ConfigError(f"estimator={estimator!r} must be k1, k2 or k3.")


def kl_penalized(
    token_rewards: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    weight: float,
    estimator: KLEstimator = "k1",
) -> torch.Tensor:
    """Rewards [T] less what each sampled token costs for its distance from the reference model.

        reward - weight * KL,   KL = log(proximal / reference) at sampled tokens, else 0

    The policy at the start of the step pays; no gradient. What comes back is what `gae` starts
    from: each action then answers for the distance of all that follow.

    Args:
        token_rewards: [T] such as `advantages.token_rewards` gives, packed.
        proximal_logprobs: [T] under the policy at the start of the step; see `attach`.
        ref_logprobs: [T] under the reference model; see `attach`.
        weight: in units of the reward per nat, 0 or more.
        estimator: k1 is what the papers subtract.

    Raises:
        ConfigError: there are no reference log-probs, or the weight is below 0.

    Source: InstructGPT, arXiv:2203.02155 equation 2; REINFORCE++, arXiv:2501.03262.
    """
    if not weight >= 0:
        raise ConfigError(f"The weight of the KL is {weight}; it must be 0 or more.")
    with torch.no_grad():
        kl = kl_estimate(proximal_logprobs, ref_logprobs, loss_mask, estimator)
        return token_rewards - weight * kl
