"""Hidden states to token log-probs: the only place that shifts by one.

T packed tokens, H hidden size, V vocabulary. For log-probs the logits [T, V] never exist at once:
they are made tile by tile over the vocabulary, all tokens at a time, and again in the backward
pass, where each token's upstream gradient is known. A tile's rows of the head's gradient are final
when it is done, so nothing of the size of the head is added up.
"""

import torch

# Columns of logits in one tile. Two tiles exist at a time, 1/37 of the logits at V = 151,936. On a
# CPU a tile should fit into the cache: at 4,096 tokens, twice as wide takes a third to two thirds
# longer.
TILE_WIDTH = 2048


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
    before, temperature = _predecessors(hidden), _divisor(temperature, dtype)
    logprobs, entropy = TokenLogprobs.apply(before, head, token_ids, temperature)
    return logprobs.masked_fill(is_first, 0.0), entropy.masked_fill(is_first, 0.0)


def packed_logits(
    hidden: torch.Tensor,
    head: torch.Tensor,
    temperature: torch.Tensor,
    is_first: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] that token t was drawn from, made from the tokens before t, and entropies [T].

    For losses that need more of a distribution than the log-prob of one token; all of them are in
    memory at once. Arguments as those of `packed_logprobs`; 0 for first tokens.
    """
    logits = (_predecessors(hidden) @ head.T).to(dtype) / _divisor(temperature, dtype)[:, None]
    with torch.no_grad():
        entropy = torch.cat([_entropy(part) for part in logits.split(TILE_WIDTH)])
    return logits.masked_fill(is_first[:, None], 0.0), entropy.masked_fill(is_first, 0.0)


def packed_values(
    hidden: torch.Tensor,
    head: torch.Tensor,
    is_first: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """What a critic expects before it sees token t, from the tokens before; [T], 0 for first ones.

    Args:
        head: [1, H] weight of the critic's head; the others as those of `packed_logprobs`.
    """
    values = (_predecessors(hidden) @ head.T)[:, 0].to(dtype)
    return values.masked_fill(is_first, 0.0)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def _predecessors(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden state t - 1 predicts token t. Row 0 stands in for its missing predecessor."""
    return torch.cat([hidden[:1], hidden[:-1]])


def _divisor(temperature: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(temperature == 0, 1.0, temperature).to(dtype)


class TokenLogprobs(torch.autograd.Function):
    """log_softmax(hidden @ head.T / temperature) at the targets, tiled and recomputed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies, both [T], in the precision of `temperature`."""
        # Over the tiles so far: largest logit, sum of exp(logit - largest), the same times logit.
        largest = torch.full_like(temperature, -torch.inf)
        total, weighted = torch.zeros_like(temperature), torch.zeros_like(temperature)
        chosen = torch.zeros_like(temperature)  # the target's logit
        space, powers_space = _space(hidden, hidden.dtype), _space(hidden, temperature.dtype)
        for start, part in _tiles(head):
            logits = _logits(hidden, part, temperature, space)
            column, is_here = _target_columns(targets, start, len(part))
            chosen += logits.gather(1, column)[:, 0].where(is_here, 0.0)
            previous, largest = largest, torch.maximum(largest, logits.amax(-1))
            # One exp for both sums.
            powers = torch.sub(logits, largest[:, None], out=powers_space[:, : len(part)]).exp_()
            shrink = (previous - largest).exp()
            total = total * shrink + powers.sum(-1)
            weighted = weighted * shrink + logits.mul_(powers).sum(-1)
        normalizer = total.log() + largest
        entropy = normalizer - weighted / total
        ctx.save_for_backward(hidden, head, targets, temperature, normalizer)
        ctx.mark_non_differentiable(entropy)
        return chosen - normalizer, entropy

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, upstream: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        """Gradients of hidden and head; tokens with no upstream gradient cost nothing."""
        all_hidden, head, targets, temperature, normalizer = ctx.saved_tensors  # type: ignore[attr-defined]
        used = upstream.nonzero()[:, 0]
        hidden, targets, temperature = all_hidden[used], targets[used], temperature[used]
        normalizer, scale = normalizer[used, None], (upstream[used] / temperature)[:, None]
        grad_hidden = torch.zeros_like(hidden, dtype=temperature.dtype)
        grad_head = torch.empty_like(head) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
        space = _space(hidden, hidden.dtype)
        for start, part in _tiles(head):
            logits = _logits(hidden, part, temperature, space)
            column, is_here = _target_columns(targets, start, len(part))
            # d logprob / d logits = onehot - softmax.
            grad = logits.sub_(normalizer).exp_().mul_(-scale)
            grad.scatter_add_(1, column, scale.where(is_here[:, None], 0.0))
            grad = grad.to(head.dtype)
            grad_hidden += grad @ part
            if grad_head is not None:
                torch.mm(grad.T, hidden, out=grad_head[start : start + len(part)])
        grad_all_hidden = torch.zeros_like(all_hidden)
        grad_all_hidden[used] = grad_hidden.to(hidden.dtype)
        return grad_all_hidden, grad_head, None, None


def _tiles(head: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The head's rows in parts of TILE_WIDTH, each with the number of its first row."""
    return list(zip(range(0, len(head), TILE_WIDTH), head.split(TILE_WIDTH), strict=True))


def _space(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for one tile, used by all of them: on a CPU new memory costs more than the sums."""
    return torch.empty(len(hidden), TILE_WIDTH, dtype=dtype, device=hidden.device)


def _logits(
    hidden: torch.Tensor, part: torch.Tensor, temperature: torch.Tensor, space: torch.Tensor
) -> torch.Tensor:
    """Logits [T, tile], made in the head's precision as the server makes them, then widened."""
    logits = torch.mm(hidden, part.T, out=space[:, : len(part)])
    return logits.to(temperature.dtype).div_(temperature[:, None])


def _target_columns(
    targets: torch.Tensor, start: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's column [T, 1] in the tile, any column if it is elsewhere; is it here [T]?"""
    columns = targets - start
    return columns.clamp(0, width - 1)[:, None], (columns >= 0) & (columns < width)
