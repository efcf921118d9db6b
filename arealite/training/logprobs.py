"""Hidden states to token log-probs: the only place that shifts by one.

T packed tokens, H hidden size, V vocabulary. The logits [T, V] never exist at once: they are made
chunk by chunk over tokens, and again in the backward pass, where each token's upstream gradient
is known (the head's weight gradient needs it).
"""

import torch

# Logits in one chunk: 256 MB in float32, so that the chunk and its gradient fit beside a model.
CHUNK_ELEMENTS = 2**26


def packed_logprobs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: torch.Tensor,
    is_first: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each token given its predecessors, and the entropy it was drawn from; both [T].

    0 for the first token of each sequence, which nothing precedes. Only the log-probs have a
    gradient, to `hidden` and `head`.

    Args:
        hidden: [T, H] last hidden states.
        head: [V, H] weight of the model's head.
        token_ids: [T] int64.
        temperature: [T] the logits of token t are divided by temperature[t]; 0 (greedy) counts
            as 1, since the distribution it stands for has no log-probs.
        is_first: [T] bool, True for the first token of each sequence.
        dtype: of all from the logits on, and of what comes back.
    """
    # Hidden state t - 1 predicts token t. Row 0 stands in for its missing predecessor.
    before = torch.cat([hidden[:1], hidden[:-1]])
    temperature = torch.where(temperature == 0, 1.0, temperature).to(dtype)
    logprobs, entropy = TokenLogprobs.apply(before, head, token_ids, temperature)
    return logprobs.masked_fill(is_first, 0.0), entropy.masked_fill(is_first, 0.0)


class TokenLogprobs(torch.autograd.Function):
    """log_softmax(hidden @ head.T / temperature) at the targets, chunked and recomputed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies, both [T], in the precision of `temperature`."""
        logprobs = torch.empty_like(temperature)
        normalizer, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(len(targets), len(head)):
            logits = _logits(hidden[rows], head, temperature[rows])
            # One exp for both: it is most of the work beside the matrix product.
            largest = logits.amax(-1, keepdim=True)
            powers = (logits - largest).exp_()
            total = powers.sum(-1)
            normalizer[rows] = total.log() + largest[:, 0]
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalizer[rows]
            # As a batch of dot products, so that no third [chunk, V] is made.
            mean_logit = torch.einsum("tv,tv->t", powers, logits) / total
            entropy[rows] = normalizer[rows] - mean_logit
        ctx.save_for_backward(hidden, head, targets, temperature, normalizer)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, upstream: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        """Gradients of hidden and head; tokens with no upstream gradient cost nothing."""
        hidden, head, targets, temperature, normalizer = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(head, dtype=temperature.dtype)
        used = upstream.nonzero()[:, 0]
        for chunk in _chunks(len(used), len(head)):
            rows = used[chunk]
            logits = _logits(hidden[rows], head, temperature[rows])
            scale = (upstream[rows] / temperature[rows])[:, None]
            # d logprob / d logits = onehot - softmax.
            grad = logits.sub_(normalizer[rows, None]).exp_().mul_(-scale)
            grad.scatter_add_(1, targets[rows, None], scale)
            grad = grad.to(head.dtype)
            grad_hidden[rows] = grad @ head
            grad_head += grad.T @ hidden[rows]
        return grad_hidden, grad_head.to(head.dtype), None, None


def _logits(hidden: torch.Tensor, head: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logits [chunk, V], made in the head's precision as the server makes them, then widened."""
    return (hidden @ head.T).to(temperature.dtype).div_(temperature[:, None])


def _chunks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]
