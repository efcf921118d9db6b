"""Which models are refused before anything trains, and which are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GraniteConfig

from arealite.errors import ConfigError
from arealite.training import attention
from arealite.training.canary import check_model
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.model import PolicyModel, load_model
from tests.training.helpers import SHAPE, VOCABULARY, save_random_model

CPU = torch.device("cpu")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 48}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "decoder_layers": 1,
    "encoder_layers": 1,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "encoder_ffn_dim": 32,
    "init_std": 0.1,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
JAMBA = {
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "mamba_d_state": 4,
    "num_experts": 2,
    "use_mamba_kernels": False,
}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "initializer_range": 0.2}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 4096}
FAR_WINDOW = {"use_sliding_window": True, "sliding_window": 4096}
MIXES, MASK, ALONE = "lets packed sequences see each other", "another mask", "packed than alone"

# Family, settings, and what is said of it.
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "state space": ("mamba", SHAPE, MIXES),
    "state space beside attention": ("jamba", {**SHAPE, **JAMBA}, MIXES),
    "recurrence beside attention": ("recurrent_gemma", {**SHAPE, "lru_width": 64}, MIXES),
    "linear attention": ("qwen3_next", {**SHAPE, **SHARED_EXPERT, **LINEAR}, MIXES),
    "convolution beside attention": ("lfm2", {**SHAPE, **CONVOLUTION}, MIXES),
    "layers that lose the layout": ("stablelm", SHAPE, MIXES),
    "attention of its own": ("openai-gpt", {"n_embd": 32, "n_layer": 1, "n_head": 2}, MIXES),
    "ALiBi": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2}, MIXES),
    "ALiBi in a mask": ("mpt", {"d_model": 32, "n_layers": 1, "n_heads": 2}, "cannot run packed"),
    "positions of its own": ("bart", BART, MIXES),
    "positions that begin at the padding id": ("roberta", {**SHAPE, "is_decoder": True}, ALONE),
    "an encoder": ("bert", SHAPE, MASK),
    "both directions": ("gemma3_text", {**SHAPE, "use_bidirectional_attention": True}, MASK),
    "capped attention": ("gemma2", SHAPE, "softcap"),
    "attention sinks": ("gpt_oss", {**SHAPE, "num_local_experts": 4}, "s_aux"),
    "a mask of its own": ("doge", SHAPE, "attention_mask"),
    "chunked attention": ("llama4_text", {**SHAPE, **LLAMA4}, "cannot run packed"),
    # In transformers 5.19 only its mask knows of the window.
    "a window its attention ignores": (
        "qwen2_moe",
        {**SHAPE, **SHARED_EXPERT, **FAR_WINDOW, "max_window_layers": 1},
        MASK,
    ),
}

RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "absolute positions": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "parallel residuals": ("gpt_neox", {**SHAPE, "hidden_dropout": 0.1}),
    "a window far beyond the canary": ("qwen2", {**SHAPE, **FAR_WINDOW, "max_window_layers": 1}),
    "a window within the canary": ("gemma3_text", {**SHAPE, "sliding_window": 3}),
    "experts": ("qwen3_moe", {**SHAPE, **EXPERTS}),
}


def policy_of(family: str, options: dict[str, Any], folder: Path) -> PolicyModel:
    path = save_random_model(AutoConfig.for_model(family, **options), folder)
    return PolicyModel(load_model(path))


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_cannot_be_trained_packed_is_refused(case: str, tmp_path: Path):
    family, options, message = WRONG[case]
    policy = policy_of(family, options, tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_model(policy, CPU)


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_can_be_trained_packed_passes_and_is_left_as_it_was(
    case: str, dtype: torch.dtype, tmp_path: Path
):
    policy = policy_of(*RIGHT[case], tmp_path).to(dtype)
    check_model(policy, CPU)
    assert policy.model.config._attn_implementation == attention.ATTENTION
    assert not policy.model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_refuses_before_anything_trains(dtype: str, tmp_path: Path):
    path = save_random_model(AutoConfig.for_model("mbart", **BART), tmp_path)
    with pytest.raises(ConfigError, match="counts positions through all of them"):
        FSDPEngine(path, FSDPConfig(dtype=dtype))  # type: ignore[arg-type]


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path):
    config = GraniteConfig(**SHAPE, logits_scaling=0.1, embedding_multiplier=10)
    policy = PolicyModel(load_model(save_random_model(config, tmp_path)))
    with pytest.raises(ConfigError, match="more to its logits"):
        check_model(policy, CPU)


def test_attention_that_ignores_the_layout_is_refused(
    model_path: str, monkeypatch: pytest.MonkeyPatch
):
    def ignores_the_layout(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: object, **_: object
    ) -> tuple[torch.Tensor, None]:
        return attention.packed_attention(module, query, key, *rest, layout=None)  # type: ignore[arg-type]

    policy = PolicyModel(load_model(model_path))
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping, attention.ATTENTION, ignores_the_layout
    )
    with pytest.raises(ConfigError, match=MIXES):
        check_model(policy, CPU)
