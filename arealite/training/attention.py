"""Attention of packed sequences: none sees another. Registered with transformers by name.

T packed tokens, N sequences, H heads, D head size. CPU (and CUDA in float32): sequences of about
equal length are padded to one block and go through SDPA together. CUDA in half precision:
`varlen_attn`, which takes the packed tokens as they are.
"""

from dataclasses import dataclass

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from arealite.errors import ConfigError

ATTENTION = "arealite_varlen"

# What models hand to every attention and what changes nothing here: dropout is left out on purpose,
# since two forwards of one policy must agree; positions are in query and key already.
# `check_model` finds a model that is not causal.
HARMLESS = {"dropout", "is_causal", "logits_to_keep", "position_ids"}

# A bucket may hold this many times its own tokens. One SDPA call costs about as much as 100
# tokens of it on a CPU core, so padding a little is cheaper than one call per length.
PADDING = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayout:
    """Where each sequence of a micro-batch lies; made once per forward, used by every layer."""

    cu_seqlens: torch.Tensor  # [N + 1] int32 on the model's device
    position_ids: torch.Tensor  # [T] int64, from 0 in each sequence
    max_length: int
    padded: torch.Tensor  # [P >= T] int64 token of each place of all buckets' blocks
    place: torch.Tensor  # [T] int64 place of each token in `padded`
    buckets: tuple[tuple[int, int], ...]  # (sequences, block length) of each block


def packed_layout(cu_seqlens: torch.Tensor, device: torch.device) -> PackedLayout:
    """The layout of sequences that begin and end at `cu_seqlens` [N + 1], a CPU tensor."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    order = lengths.argsort(stable=True)
    position_ids = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    buckets = _buckets(lengths[order].tolist())
    padded, first_place, filled, taken = [], torch.empty_like(starts), 0, 0
    for count, block in buckets:
        members = order[taken : taken + count]
        # Padding repeats a sequence's own last token: a nan elsewhere cannot leak through it.
        inside = torch.arange(block).minimum(lengths[members, None] - 1)
        padded.append((starts[members, None] + inside).flatten())
        first_place[members] = filled + block * torch.arange(count)
        filled, taken = filled + count * block, taken + count
    return PackedLayout(
        cu_seqlens=cu_seqlens.to(device),
        position_ids=position_ids.to(device),
        max_length=int(lengths.max()),
        padded=torch.cat(padded).to(device),
        place=(first_place.repeat_interleave(lengths) + position_ids).to(device),
        buckets=tuple(buckets),
    )


def _buckets(lengths: list[int]) -> list[tuple[int, int]]:
    """(sequences, block length) for ascending lengths, each block at most PADDING times full."""
    buckets: list[tuple[int, int]] = []
    count = tokens = block = 0
    for length in lengths:
        if count and (count + 1) * length > PADDING * (tokens + length):
            buckets.append((count, block))
            count = tokens = 0
        count, tokens, block = count + 1, tokens + length, length
    return [*buckets, (count, block)]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: PackedLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence: [1, T, H, D]. The signature is transformers'.

    Args:
        query: [1, H, T, D]; key and value may have fewer heads.
        attention_mask: None. One that is there was not asked of `_no_mask`: the model made it.
        layout: handed through by the model's forward. Without it the input is one sequence.
        others: what other implementations understand. Raises ConfigError, with the name, for what
            would change the result, such as `softcap`, `s_aux` (sinks) or `block_indices`.
    """
    asked = {"attention_mask": attention_mask, **others}
    unknown = [f"`{x}`" for x, value in asked.items() if not (x in HARMLESS or _is_off(value))]
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} uses attention with {', '.join(unknown)}, which packed "
            "attention does not have. Train a model without it, such as Qwen2, Qwen3 or Llama."
        )
    if layout is None:
        layout = packed_layout(torch.tensor([0, query.shape[2]]), query.device)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    is_flash = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    attend = _varlen if is_flash else _bucketed
    return attend(query, key, value, layout, scaling, sliding_window).unsqueeze(0), None


def _is_off(value: object) -> bool:
    return value is None or value is False


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens,
        layout.cu_seqlens,
        layout.max_length,
        layout.max_length,
        scale=scaling,
        # transformers' window W counts the token itself, this one does not; -1 is no limit.
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=True,
    )
    assert isinstance(out, torch.Tensor)
    return out


def _bucketed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    sizes = [count * block for count, block in layout.buckets]
    blocks = [x.index_select(0, layout.padded).split(sizes) for x in (query, key, value)]
    outputs = []
    for (count, block), *parts in zip(layout.buckets, *blocks, strict=True):
        q, k, v = (x.view(count, block, *x.shape[1:]).transpose(1, 2) for x in parts)
        mask = None
        if sliding_window is not None and block > sliding_window:
            steps = torch.arange(block, device=q.device)
            age = steps[:, None] - steps
            mask = (age >= 0) & (age < sliding_window)
        # Padding is on the right, so the causal order alone keeps real tokens from seeing it.
        out = scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.place)


def _no_mask(*_: object, **__: object) -> None:
    """No mask: the layout says who may see whom."""


def register() -> None:
    """Make `attn_implementation="arealite_varlen"` known to transformers; may be called again."""
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
