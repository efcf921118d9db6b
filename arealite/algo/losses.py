"""The pieces of a policy loss, per token. A recipe multiplies them with `loss_weight` and sums.

T packed tokens. Index t holds facts about token t. Three policies meet: *behavior* sampled the
token, *proximal* is the policy at the start of the training step, *current* is being updated.
"""

import torch

from arealite.errors import ConfigError

# exp(20) = 4.9e8: beyond it a ratio says nothing more, and its gradient would be inf * 0 = nan.
MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective [T], to be maximized, and where the clip stops the gradient [T] bool.

    min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) with ratio = current / proximal.

    Args:
        logprobs: [T] under the current policy, with gradient.
        proximal_logprobs: [T] under the policy at the start of the step; see `attach`.
        advantages: [T] float32.
        loss_mask: [T] bool; elsewhere the ratio is 1 and has no gradient.
        clip_low: the ratio may fall to 1 - clip_low before its gradient stops.
        clip_high: the ratio may rise to 1 + clip_high before its gradient stops.

    Source: arXiv:1707.06347 equation 7; asymmetric limits, DAPO, arXiv:2503.14476.
    """
    _require_attached("proximal_logprobs", proximal_logprobs, logprobs)
    ratio = _masked_exp(logprobs - proximal_logprobs, loss_mask)
    unclipped = ratio * advantages
    limited = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.minimum(unclipped, limited), loss_mask & (limited < unclipped)


def importance_weight(
    proximal_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """proximal / behavior [T] without gradient, and which tokens the cap leaves out [T] bool.

    Corrects for tokens sampled by older weights. A token above the cap gets weight 0: it leaves
    the loss, but stays in the denominator. `cap=math.inf` keeps all.

    Args:
        proximal_logprobs: [T] under the policy at the start of the step; see `attach`.
        behavior_logprobs: [T] as the sampler reported them.
        loss_mask: [T] bool; elsewhere the weight is 1.
        cap: largest weight that is still used, above 0.

    Source: decoupled objective, arXiv:2110.00641; its use here, arXiv:2505.24298.
    """
    if not cap > 0:
        raise ConfigError(f"The cap of the importance weight is {cap}; it must be above 0.")
    _require_attached("proximal_logprobs", proximal_logprobs, behavior_logprobs)
    with torch.no_grad():
        weight = _masked_exp(proximal_logprobs - behavior_logprobs, loss_mask)
        dropped = weight > cap
        return weight.masked_fill(dropped, 0.0), dropped


def _masked_exp(log_ratio: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    # Mask before exp: where() hides an overflow in the value but not in its gradient.
    masked = torch.where(loss_mask, log_ratio, 0.0)
    return masked.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _require_attached(name: str, values: torch.Tensor, like: torch.Tensor) -> None:
    if values.shape != like.shape:
        raise ConfigError(
            f"{name} has {values.numel()} values for {like.numel()} tokens. Attach it before the "
            f"step: `attach(minibatch, {name}=engine.logprobs(minibatch))`."
        )
