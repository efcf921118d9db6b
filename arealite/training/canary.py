"""Whether a model can be trained packed: asked of the model itself, before anything trains.

    packed   [x | a | b | c | ...]  ----+-- hidden states of a, b, c ... must depend on neither
    reversed [... | c | b | a | y]  ----+   neighbour nor place
    alone    a, b, c ... in transformers' own attention: must be the same function
    masks    every layer is asked whom its tokens would see, far beyond these few

A list of names would not do: whether a family mixes sequences can depend on its configuration, on
the kernels installed and on the version of transformers. N sequences of L tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from arealite.errors import ArealiteError, ConfigError
from arealite.training.attention import ATTENTION, packed_attention
from arealite.training.model import PolicyModel
from arealite.types import MicroBatch

N, L = 7, 6  # N is odd: turning the order round then leaves no sequence in its place
MASK_CHECK = "arealite_mask_check"

# Norm of the difference over the norm that is allowed, in (float32, half precision). SAME: equal
# tokens in a batch of equal shape. CLOSE: another way to compute hidden states, which rounds
# differently; 0.02 to 0.03 was seen for 24 to 48 layers in bfloat16. CLOSE_LOGPROBS: 0.004.
SAME, CLOSE, CLOSE_LOGPROBS = (1e-4, 0.02), (1e-3, 0.2), (1e-3, 0.05)


def check_model(policy: PolicyModel, device: torch.device) -> None:
    """Raises ConfigError if the model cannot be trained packed. A collective.

    Seven forwards of about 50 tokens, on the model as it will train: sharded, in its precision, on
    its device. Afterwards it is what it was.
    """
    try:
        with torch.no_grad():
            _check(policy, device)
    except ArealiteError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(policy.model).__name__} cannot run packed sequences: {error!r}. Train a model "
            "whose attention goes through transformers' AttentionInterface, such as Qwen2 or Llama."
        ) from error


def _check(policy: PolicyModel, device: torch.device) -> None:
    name = type(policy.model).__name__
    tokens = torch.randint(5, (N + 2, L), generator=torch.Generator().manual_seed(0)).to(device)
    before, sequences, after = tokens[:1], tokens[1:-1], tokens[-1:]
    batch = _packed([before, sequences])
    packed = policy.hidden(batch).unflatten(0, (-1, L))[1:]
    turned = policy.hidden(_packed([sequences.flip(0), after])).unflatten(0, (-1, L))[:-1].flip(0)
    if _differ(packed, turned, SAME):
        raise ConfigError(
            f"{name} lets packed sequences see each other, or counts positions through all of "
            "them. Train a model whose attention goes through transformers' AttentionInterface "
            "and that takes position_ids, such as Qwen2 or Llama."
        )
    with _attention(policy.model, MASK_CHECK):
        policy.alone(sequences[:1])
    with _attention(policy.model, "eager"):
        alone, logits = policy.alone(sequences)
    if _differ(packed, alone, CLOSE):
        raise ConfigError(
            f"{name} has other hidden states packed than alone: its attention is more than causal "
            "attention within a window, for example has a bias. Train a model without that, such "
            "as Qwen2, Qwen3 or Llama."
        )
    if policy.is_critic:
        return
    expected = logits[:, :-1].float().log_softmax(-1).gather(2, sequences[:, 1:, None])
    found = policy(batch)[0].unflatten(0, (-1, L))[1:, 1:, None]
    if _differ(found.to(logits.dtype), expected.to(logits.dtype), CLOSE_LOGPROBS):
        raise ConfigError(
            f"{name} does more to its logits than multiply by the head, for example cap or scale "
            "them, so its log-probs would be wrong. Train a model without that."
        )


def _differ(found: torch.Tensor, expected: torch.Tensor, limits: tuple[float, float]) -> bool:
    """Whether all of the sequences [N, ...] differ.

    Not whether any does: where two experts are about equally likely, a rounding decides between
    them, and one sequence of a good model may differ visibly.
    """
    difference, norm = (x.double().flatten(1).norm(dim=1) for x in (found - expected, expected))
    # Not `>`: a nan differs.
    return not bool((difference <= limits[expected.dtype.itemsize < 4] * norm).any())


@contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Another attention for a while."""
    AttentionMaskInterface.register(MASK_CHECK, _asked_mask)
    AttentionInterface.register(MASK_CHECK, _checked_attention)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)


def _asked_mask(
    *,
    mask_function: Callable[..., torch.Tensor],
    device: torch.device | None = None,
    local_size: int | None = None,
    **_: object,
) -> torch.Tensor:
    """[1, 1, P, 3] query, key and whether that query sees that key, at both sides of the window.

    Args:
        mask_function: of batch, head, query and key index; transformers makes all masks from it.
        local_size: the window or chunk of the layers that the mask is for, in tokens.
    """
    size = local_size or L
    edges = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size, 2 * size + 1], device=device)
    query, key = torch.cartesian_prod(edges, edges).unbind(1)
    zero = torch.zeros_like(query)
    visible = mask_function(zero, zero, query, key)
    return torch.stack([query, key, visible.long()], dim=1)[None, None]


def _checked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Packed attention of a layer whose mask, as `_asked_mask` made it, is the one that it has."""
    if attention_mask is not None:
        asking, asked, visible = attention_mask[0, 0].unbind(1)
        is_seen = (asked <= asking) & (asking - asked < (sliding_window or torch.inf))
        if not torch.equal(is_seen, visible.bool()):
            raise ConfigError(
                f"{type(module).__name__} wants another mask than packed attention has: causal"
                f"{f' within {sliding_window} tokens' if sliding_window else ''}. It may be "
                "chunked, or ignore its own window. Train a model without that, such as Qwen2, "
                "Qwen3 or Llama."
            )
    return packed_attention(
        module,
        query,
        key,
        value,
        None,
        sliding_window=sliding_window,
        **others,  # type: ignore[arg-type]
    )


def _packed(parts: list[torch.Tensor]) -> MicroBatch:
    """The sequences of all parts [any number, L], one after the other."""
    tokens = torch.cat(parts).flatten()
    zeros = torch.zeros(len(tokens), device=tokens.device)
    return MicroBatch(
        token_ids=tokens,
        cu_seqlens=torch.arange(0, len(tokens) + 1, L, dtype=torch.int32),
        loss_mask=zeros.bool(),
        behavior_logprobs=zeros,
        versions=zeros.long(),
        temperature=zeros + 1,
        advantages=zeros,
        loss_weight=zeros,
    )
