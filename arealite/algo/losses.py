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

        min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A),
        ratio = current / proximal

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


def dual_clipped(
    surrogate: torch.Tensor, advantages: torch.Tensor, *, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The surrogate, but never below cap * A where A < 0; and where that stops the gradient.

        max(surrogate, cap * A) where A < 0, else surrogate

    What was sampled by a much older policy may have a huge ratio; with a negative advantage the
    clip above does not bound it.

    Args:
        surrogate: [T] of `clipped_surrogate`, before any weight.
        advantages: [T] the same.
        cap: above 1; 3 in the paper.

    Source: dual-clip PPO, arXiv:1912.09729 equation 5.
    """
    if not cap > 1:
        raise ConfigError(f"The cap of a dual clip is {cap}; it must be above 1.")
    floor = cap * advantages
    is_cut = (advantages < 0) & (surrogate < floor)
    return torch.where(is_cut, floor, surrogate), is_cut


def sequence_surrogate(
    logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GSPO's objective [T], to be maximized, and where the clip stops the gradient [T] bool.

        min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A),
        s = exp(mean over the sequence of log(current / proximal))

    As `clipped_surrogate`, with one ratio for all tokens of a sequence: the geometric mean
    exp(mean over its sampled tokens of current - proximal). With `aggregation="sequence"` the
    tokens of a sequence sum to its term of the paper's mean over sequences.

    Args:
        cu_seqlens: [N + 1] starts at 0 and ends at T.
        clip_low, clip_high: of a geometric mean, so far smaller than PPO's: 3e-4 and 4e-4.

    Source: GSPO, arXiv:2507.18071 equations 5 to 7.
    """
    _require_attached("proximal_logprobs", proximal_logprobs, logprobs)
    log_ratio = mean_of_sequence(logprobs - proximal_logprobs, loss_mask, cu_seqlens)
    ratio = _masked_exp(log_ratio, loss_mask)
    unclipped = ratio * advantages
    limited = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.minimum(unclipped, limited), loss_mask & (limited < unclipped)


def cispo_surrogate(
    logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO's objective [T], to be maximized, and where its weight is clipped [T] bool.

        clip(ratio, 1 - clip_low, 1 + clip_high) * A * log current

    No gradient goes through the ratio: a clipped token goes on teaching with a bounded weight,
    where PPO would drop it.

    Args:
        clip_low: large, so that it never acts, in the paper; 1 is the largest that means anything.
        clip_high: .2 to .28.

    Source: CISPO, MiniMax-M1, arXiv:2506.13585 equations 4 and 5.
    """
    _require_attached("proximal_logprobs", proximal_logprobs, logprobs)
    with torch.no_grad():
        ratio = _masked_exp(logprobs - proximal_logprobs, loss_mask)
        weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    current = torch.where(loss_mask, logprobs, 0.0)
    return weight * advantages * current, loss_mask & (weight != ratio)


def sapo_surrogate(
    logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> torch.Tensor:
    """SAPO's objective [T], to be maximized: a gate that closes smoothly instead of a clip.

        4 / tau * sigmoid(tau * (ratio - 1)) * A

    Its gradient at ratio 1 is PPO's.

    Args:
        tau_positive: of tokens with A > 0; the larger, the sooner the gate closes.
        tau_negative: of the others.

    Source: SAPO, arXiv:2511.20347.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ConfigError(f"tau is {tau_positive} and {tau_negative}; both must be above 0.")
    _require_attached("proximal_logprobs", proximal_logprobs, logprobs)
    ratio = _masked_exp(logprobs - proximal_logprobs, loss_mask)
    positive, negative = ratio.new_tensor([tau_positive, tau_negative])
    tau = torch.where(advantages > 0, positive, negative)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


def tv_surrogate(
    logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    limit: float = 0.2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DPPO's objective [T], to be maximized, and which tokens are dropped [T] bool.

        ratio * A, or 0 where (current - proximal) * sign(A) > limit

    Dropped is what has moved by more than `limit` in the direction of A. A rare token's ratio moves
    far where its probability, and so the policy, hardly does.

    Args:
        limit: of |current - proximal| as probabilities, the total variation of "this token or
            another one".

    Source: DPPO with binary total variation, arXiv:2602.04879.
    """
    _require_attached("proximal_logprobs", proximal_logprobs, logprobs)
    ratio = _masked_exp(logprobs - proximal_logprobs, loss_mask)
    moved = (logprobs.exp() - proximal_logprobs.exp()).detach()
    dropped = loss_mask & (moved * advantages.sign() > limit)
    return torch.where(dropped, 0.0, ratio * advantages), dropped


def importance_weight(
    proximal_logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """proximal / behavior [T] without gradient, and which tokens the cap leaves out [T] bool.

        weight = proximal / behavior, or 0 where that is above cap

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


def entropy(logits: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Entropy [T] in nats of what each sampled token was drawn from; 0 elsewhere.

        H = -sum over the vocabulary of p log p,   p = softmax(logits)

    As a bonus it is added to the objective, before the weights of the tokens:

        total = -(loss_weight * (surrogate + bonus * entropy)).sum()

    It needs whole distributions, so the loss is one of `engine.step(minibatch, loss_fn,
    head="logits")`, and finds the log-prob of each token in them itself:
    `logits.log_softmax(-1).gather(-1, mb.token_ids[:, None])[:, 0]`.

    Args:
        logits: [T, V] that the tokens were drawn from, over their temperature, with gradient.
        loss_mask: [T] bool, True where the policy sampled the token.

    Source: PPO, arXiv:1707.06347 equation 9; before it A3C, arXiv:1602.01783.
    """
    logprobs = logits[loss_mask].log_softmax(-1)
    # What cannot be drawn has -inf, and 0 * -inf = nan.
    terms = logprobs.exp() * logprobs.clamp(min=torch.finfo(logits.dtype).min)
    return logits.new_zeros(len(logits)).masked_scatter(loss_mask, -terms.sum(-1))


def mean_of_sequence(
    values: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """[T] for each token the mean over the sampled tokens of its sequence; 0 if it has none.

        m = sum(x) / n over the n sampled tokens

    What was not sampled may be anything, also nan.
    """
    sums, counts = (
        sum_of_sequence(each, loss_mask, cu_seqlens) for each in (values, torch.ones_like(values))
    )
    return sums / counts.clamp(min=1)


def sum_of_sequence(
    values: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """[T] for each token the sum over the sampled tokens of its sequence.

        s = sum(x) over the sampled tokens

    What was not sampled may be anything, also nan.
    """
    lengths = cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(lengths)  # [T] which one each token is of
    masked = torch.where(loss_mask, values, 0.0)
    return values.new_zeros(len(lengths)).index_add(0, sequence, masked)[sequence]


def _masked_exp(log_ratio: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    # Mask before exp: where() hides an overflow in the value but not in its gradient.
    masked = torch.where(loss_mask, log_ratio, 0.0)
    return masked.clamp(max=MAX_LOG_RATIO).exp()


def _require_attached(name: str, values: torch.Tensor, like: torch.Tensor) -> None:
    if values.shape != like.shape:
        raise ConfigError(
            f"{name} has {values.numel()} values for {like.numel()} tokens. Attach it before the "
            f"step: `attach(minibatch, {name}=engine.logprobs(minibatch))`."
        )
