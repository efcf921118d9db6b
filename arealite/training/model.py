"""A causal language model as a function of a micro-batch: log-probs in, nothing else out.

T packed tokens, H hidden size. `PolicyModel` is the root that FSDP wraps: the head's weight is
whole only while the root's forward runs, so the log-probs are computed inside of it.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from arealite.data.models import resolve_model
from arealite.errors import ConfigError, DataError
from arealite.training import attention
from arealite.training.logprobs import packed_logprobs
from arealite.types import MicroBatch


def load_model(
    name_or_path: str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model with packed attention and without dropout; in the checkpoint's dtype by default.

    Raises DataError for what is no causal language model.
    """
    attention.register()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            resolve_model(name_or_path),
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attention.ATTENTION,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name_or_path!r} could not be loaded as a causal language model: {error}. "
            "Give a Hugging Face id, or a folder with config.json and *.safetensors."
        ) from error
    for module in model.modules():
        # Two forwards of one policy must agree, or its ratio to itself is not 1.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval().to(device)  # type: ignore[arg-type]


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated layers, which FSDP gathers one at a time."""
    names = set(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} does not name its blocks in `_no_split_modules`, so it "
            "cannot be sharded. Train a model that does, such as Qwen2, Qwen3 or Llama."
        )
    return found


class PolicyModel(torch.nn.Module):
    """Micro-batch in, log-probs and entropies out; both [T] float32, or float64 if the model is."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, mb: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `packed_logprobs`. An empty micro-batch runs one token, so that ranks stay in step."""
        if mb.num_sequences == 0:
            mb = replace(
                mb,
                token_ids=mb.token_ids.new_zeros(1),
                cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
                temperature=mb.temperature.new_ones(1),
            )
            logprobs, entropy = self.forward(mb)
            # Not a view: FSDP hangs its backward hook on what comes out here.
            return logprobs[:0].clone(), entropy[:0]
        hidden, layout = self._hidden(mb)
        return packed_logprobs(
            hidden,
            self._head(),
            mb.token_ids,
            mb.temperature,
            layout.position_ids == 0,
            dtype=_wide(hidden.dtype),
        )

    def hidden_and_reference(self, mb: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [T, H], and log-probs [T] from the model's own logits [T, V], the slow way.

        For `check_model`; temperature is not applied.
        """
        hidden, layout = self._hidden(mb)
        logits = self.model(**_inputs(mb, layout)).logits[0].to(_wide(hidden.dtype))
        before = torch.cat([logits[:1], logits[:-1]]).log_softmax(-1)
        logprobs = before.gather(1, mb.token_ids[:, None])[:, 0]
        return hidden, logprobs.masked_fill(layout.position_ids == 0, 0.0)

    def _hidden(self, mb: MicroBatch) -> tuple[torch.Tensor, attention.PackedLayout]:
        layout = attention.packed_layout(mb.cu_seqlens.cpu(), mb.token_ids.device)
        output = self.model.base_model(**_inputs(mb, layout))
        return output.last_hidden_state[0], layout

    def _head(self) -> torch.Tensor:
        head: Any = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ConfigError(
                f"{type(self.model).__name__} has a bias in its head, which would not be trained. "
                "Train a model without it, such as Qwen2, Qwen3 or Llama."
            )
        return head.weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What a model of this precision computes log-probs in: float32 or more."""
    return torch.promote_types(dtype, torch.float32)


def _inputs(mb: MicroBatch, layout: attention.PackedLayout) -> dict[str, Any]:
    return {
        "input_ids": mb.token_ids[None],
        "position_ids": layout.position_ids[None],
        "layout": layout,
        "use_cache": False,
    }


def on_device(mb: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with all of its fields on the device."""
    if mb.token_ids.device == device:
        return mb
    names = [field.name for field in fields(mb)]
    return replace(mb, **{name: getattr(mb, name).to(device) for name in names})


def check_model(policy: PolicyModel, device: torch.device) -> None:
    """Raises ConfigError if the model cannot be trained packed. A collective.

    Two short sequences go through twice, the second time with another first one. The second
    sequence must not notice, and the chunked log-probs must be those of the model's own logits.
    """
    first, other, second = torch.tensor(
        [[3, 1, 2, 0, 4, 3], [1, 4, 0, 2, 1, 1], [2, 0, 1, 4, 3, 1]]
    )
    with torch.no_grad():
        hidden, expected = policy.hidden_and_reference(_canary(first, second, device))
        changed, _ = policy.hidden_and_reference(_canary(other, second, device))
        logprobs, _ = policy(_canary(first, second, device))
    name = type(policy.model).__name__
    # In half precision two ways to make the same logits differ by a rounding, 0.25 at 32.
    is_half = hidden.dtype not in (torch.float32, torch.float64)
    close, equal = (0.3, 0.05) if is_half else (1e-3, 1e-3)
    if not torch.allclose(hidden[6:], changed[6:], rtol=equal, atol=equal):
        raise ConfigError(
            f"{name} lets packed sequences see each other: its attention does not go through "
            "transformers' AttentionInterface. Train a model that does, such as Qwen2 or Llama."
        )
    if not torch.allclose(logprobs, expected, rtol=close, atol=close):
        raise ConfigError(
            f"{name} does more to its logits than multiply by the head, for example cap or scale "
            "them, so its log-probs would be wrong. Train a model without that."
        )


def _canary(first: torch.Tensor, second: torch.Tensor, device: torch.device) -> MicroBatch:
    tokens = torch.cat([first, second]).to(device)
    zeros = torch.zeros(len(tokens), device=device)
    return MicroBatch(
        token_ids=tokens,
        cu_seqlens=torch.tensor([0, len(first), len(tokens)], dtype=torch.int32),
        loss_mask=zeros.bool(),
        behavior_logprobs=zeros,
        versions=zeros.long(),
        temperature=zeros + 1,
        advantages=zeros,
        loss_weight=zeros,
    )
