"""Losses on pairs: of two responses to one prompt, somebody preferred the chosen one."""

import torch
from torch.nn.functional import logsigmoid


def dpo_loss(
    chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    ref_chosen_logprobs: torch.Tensor,
    ref_rejected_logprobs: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """Loss [N] of each pair: -log sigmoid(beta * (margin of the policy - margin of the reference)).

        -log sigmoid(beta * (log(chosen / rejected) - log(ref chosen / ref rejected)))

    Args:
        chosen_logprobs, rejected_logprobs: [N] of whole responses under the policy.
        ref_chosen_logprobs, ref_rejected_logprobs: [N] the same under the reference model.
        beta: how much the policy is held to the reference; .1 in the paper.

    Source: DPO, arXiv:2305.18290 equation 7.
    """
    margin = chosen_logprobs - rejected_logprobs
    ref_margin = ref_chosen_logprobs - ref_rejected_logprobs
    return -logsigmoid(beta * (margin - ref_margin))


def preference_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Loss [N] of a reward model: -log sigmoid(score of the chosen - score of the rejected).

        -log sigmoid(chosen - rejected)

    Source: Bradley-Terry, as in InstructGPT, arXiv:2203.02155 equation 1.
    """
    return -logsigmoid(chosen_scores - rejected_scores)
