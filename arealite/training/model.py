"""A causal language model as a function of a micro-batch: log-probs out, or logits.

T packed tokens, H hidden size. `PolicyModel` is the root that FSDP wraps: the head's weight is
whole only while the root's forward runs, so the log-probs are computed inside of it.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from arealite.data.models import resolve_model
from arealite.errors import ConfigError, DataError
from arealite.training import attention
from arealite.training.logprobs import packed_logits, packed_logprobs, packed_values
from arealite.types import Head, MicroBatch


def load_model(name_or_path: str, *, is_empty: bool = False) -> PreTrainedModel:
    """The model with packed attention and without dropout, in the checkpoint's dtype.

    Args:
        is_empty: its parameters have shapes alone, on the meta device, and no file of weights is
            read. Its buffers are real.

    Raises DataError for what is no causal language model, ConfigError for one that chooses its
    attention from a list of its own.
    """
    attention.register()
    try:
        path = resolve_model(name_or_path)
        model = _make_empty(path) if is_empty else _read(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{name_or_path!r} could not be loaded as a causal language model: {error}. "
            "Give a Hugging Face id, or a folder with config.json and *.safetensors."
        ) from error
    except KeyError as error:
        if attention.ATTENTION not in error.args:
            raise
        raise ConfigError(
            f"{name_or_path!r} cannot be trained packed: its attention does not go through "
            "transformers' AttentionInterface. Train a model that does, such as Qwen2 or Llama."
        ) from error
    _remove_dropout(model)
    return model.eval()


def _read(path: str) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", attn_implementation=attention.ATTENTION, output_loading_info=True
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers makes random ones, and warns
        raise DataError(
            f"The files of {path} lack {len(missing)} of the model's tensors, such as "
            f"{missing[0]}: they are of another model, or not whole. Get them anew."
        )
    return model


def _make_empty(path: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.ATTENTION)
    model.tie_weights()  # each parameter was replaced as soon as it was made
    return model


def _remove_dropout(model: PreTrainedModel) -> None:
    # Two forwards of one policy must agree, or its ratio to itself is not 1. Eval mode does not
    # do: activation checkpointing takes blocks out of it, and some have a dropout of their own.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated layers, which FSDP gathers one at a time; none is inside of another."""
    names = set(model._no_split_modules or ())
    found: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer in found)
        if type(module).__name__ in names and not is_inside:
            found[path] = module
    if not found:
        raise ConfigError(
            f"{type(model).__name__} does not name its blocks in `_no_split_modules`, so it "
            "cannot be sharded. Train a model that does, such as Qwen2, Qwen3 or Llama."
        )
    return list(found.values())


def make_critic(model: PreTrainedModel) -> None:
    """One number per token in place of the logits; 0 everywhere before any training."""
    head: Any = model.get_output_embeddings()
    weight = head.weight
    critic_head = torch.nn.Linear(
        weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype
    )
    if not weight.is_meta:
        torch.nn.init.zeros_(critic_head.weight)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(critic_head)


class PolicyModel(torch.nn.Module):
    """Micro-batch in, log-probs (or logits) and entropies out, in float32 or float64."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        head: Any = model.get_output_embeddings()
        self.is_critic = head.weight.shape[0] == 1
        self._longest = _longest_packable(model)

    def forward(self, mb: MicroBatch, head: Head = "logprobs") -> tuple[torch.Tensor, torch.Tensor]:
        """As `packed_logprobs`, or with `packed_logits` [T, V] or `packed_values` for log-probs.

        An empty micro-batch runs one token, so that ranks stay in step.
        """
        if mb.num_sequences == 0:
            mb = replace(
                mb,
                token_ids=mb.token_ids.new_zeros(1),
                cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
                temperature=mb.temperature.new_ones(1),
            )
            output, entropy = self.forward(mb, head)
            # Not a view: FSDP hangs its backward hook on what comes out here.
            return output[:0].clone(), entropy[:0]
        hidden, layout = self._hidden(mb)
        weight, is_first, dtype = self._head(), layout.position_ids == 0, _wide(hidden.dtype)
        if head == "values":
            values = packed_values(hidden, weight, is_first, dtype=dtype)
            return values, torch.zeros_like(values)
        if head == "logits":
            return packed_logits(hidden, weight, mb.temperature, is_first, dtype=dtype)
        return packed_logprobs(hidden, weight, mb.token_ids, mb.temperature, is_first, dtype=dtype)

    def hidden(self, mb: MicroBatch) -> torch.Tensor:
        """Last hidden states [T, H]; for `check_model`."""
        return self._hidden(mb)[0]

    def alone(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, L, H] and logits [N, L, V] of sequences as transformers has them.

        For `check_model`, which says with which attention; not for training.
        """
        hidden = self.model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        return hidden, self.model(input_ids=token_ids, use_cache=False).logits

    def _hidden(self, mb: MicroBatch) -> tuple[torch.Tensor, attention.PackedLayout]:
        layout = attention.packed_layout(mb.cu_seqlens.cpu(), mb.token_ids.device)
        if layout.max_length > self._longest:
            raise ConfigError(
                f"A sequence of {layout.max_length:,} tokens cannot be packed with others: beyond "
                f"{self._longest:,}, the rotary embedding of this {type(self.model).__name__} "
                "depends on the longest sequence of all. Lower sampling.max_new_tokens, leave out "
                "long prompts, or train a model whose rope_type is neither dynamic nor longrope."
            )
        output = self.model.base_model(
            input_ids=mb.token_ids[None],
            position_ids=layout.position_ids[None],
            layout=layout,
            use_cache=False,
        )
        return output.last_hidden_state[0], layout

    def _head(self) -> torch.Tensor:
        head: Any = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ConfigError(
                f"{type(self.model).__name__} has a bias in its head, which would not be trained. "
                "Train a model without it, such as Qwen2, Qwen3 or Llama."
            )
        return head.weight


def _longest_packable(model: PreTrainedModel) -> float:
    """Tokens of a sequence up to which rotary embeddings do not change with its neighbours."""
    longest = math.inf
    modules: Iterator[Any] = model.modules()
    for module in modules:
        types = getattr(module, "rope_type", None) or ""
        for rope_type in types.values() if isinstance(types, dict) else [types]:
            if "dynamic" in rope_type:
                longest = min(longest, module.original_max_seq_len)
            elif rope_type == "longrope":
                longest = min(longest, *_original_lengths(module.config.rope_parameters))
    return longest


def _original_lengths(parameters: dict[str, Any]) -> list[int]:
    """Of a model, or of each of its kinds of layers."""
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    key = "original_max_position_embeddings"
    return [kind[key] for kind in kinds if kind.get(key)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a model of this precision computes log-probs in: float32 or more."""
    return torch.promote_types(dtype, torch.float32)


def on_device(mb: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with all of its fields on the device."""
    if mb.token_ids.device == device:
        return mb
    names = [field.name for field in fields(mb)]
    return replace(mb, **{name: getattr(mb, name).to(device) for name in names})
