from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from arealite.algo.advantages import group_advantages
from arealite.errors import ArealiteError, ConfigError, DataError
from arealite.testing import make_tiny_model
from arealite.training import attention
from arealite.training.model import PolicyModel, check_model, load_model
from arealite.training.packing import pack
from arealite.types import MicroBatch
from tests.training.helpers import (
    VOCABULARY,
    make_groups,
    plain_logprobs,
    plain_model,
    relative_difference,
    sequences,
)

CPU = torch.device("cpu")


def packed(max_tokens: int = 10_000) -> MicroBatch:
    groups = make_groups()
    [[mb]] = pack(
        groups,
        group_advantages(groups),
        num_minibatches=1,
        max_tokens=max_tokens,
        aggregation="token",
    )
    return mb


def one_by_one(model: PreTrainedModel, mb: MicroBatch) -> torch.Tensor:
    return torch.cat(
        [
            plain_logprobs(model, list(ids), temperature.tolist())
            for ids, temperature in sequences(mb, mb.temperature)
        ]
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


def save(config: PreTrainedConfig, folder: Path) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.05,
}


@pytest.fixture(params=["qwen2-tied", "qwen3-untied", "llama-tied", "qwen2-sliding", "qwen3_moe"])
def any_model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Folders of random float32 models; the sliding window is shorter than most sequences."""
    if request.param == "qwen2-sliding":
        window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        return save(AutoConfig.for_model("qwen2", **SHAPE, **window), tmp_path)
    if request.param == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        return save(AutoConfig.for_model("qwen3_moe", **SHAPE, **experts), tmp_path)
    family, head = request.param.split("-")
    return make_tiny_model(tmp_path, family=family, is_tied=head == "tied", dtype=torch.float32)


def test_packed_log_probs_and_gradients_equal_those_of_one_sequence_at_a_time(any_model: str):
    mb = packed()
    upstream = torch.randn(len(mb.token_ids))
    policy, reference = PolicyModel(load_model(any_model)), plain_model(any_model)
    found, _ = policy(mb)
    expected = one_by_one(reference, mb)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert relative_difference(gradients(policy.model), gradients(reference)) < 1e-5


@pytest.mark.parametrize("padding", [1.0, 1.1, 100.0])
def test_padding_inside_of_attention_changes_nothing(
    padding: float, model_path: str, monkeypatch: pytest.MonkeyPatch
):
    mb = packed()
    policy = PolicyModel(load_model(model_path))
    expected = one_by_one(plain_model(model_path), mb)
    monkeypatch.setattr(attention, "PADDING", padding)
    with torch.no_grad():
        torch.testing.assert_close(policy(mb)[0], expected, rtol=1e-5, atol=1e-5)


def test_changing_one_sequence_changes_only_its_own_log_probs_and_gradients(model_path: str):
    policy = PolicyModel(load_model(model_path))
    before = packed()
    start, end = before.cu_seqlens[3:5].tolist()
    inside = torch.zeros(len(before.token_ids), dtype=torch.bool)
    inside[start:end] = True
    after = packed()
    after.token_ids[inside] = (after.token_ids[inside] + 1) % VOCABULARY
    with torch.no_grad():
        first, second = policy(before)[0], policy(after)[0]
    assert torch.equal(first[~inside], second[~inside])
    # All but the first token of the changed sequence, which has no log-prob.
    assert (first[inside] != second[inside]).sum() == end - start - 1


def test_an_empty_micro_batch_gives_no_log_probs_but_reaches_every_weight(model_path: str):
    policy = PolicyModel(load_model(model_path))
    nothing = torch.empty(0)
    empty = MicroBatch(
        token_ids=nothing.long(),
        cu_seqlens=torch.tensor([0], dtype=torch.int32),
        loss_mask=nothing.bool(),
        behavior_logprobs=nothing,
        versions=nothing.long(),
        temperature=nothing,
        advantages=nothing,
        loss_weight=nothing,
    )
    logprobs, entropy = policy(empty)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert all(gradient.abs().sum() == 0 for gradient in gradients(policy.model).values())


# ---- what is refused


def test_a_model_whose_sequences_see_each_other_is_refused(
    model_path: str, monkeypatch: pytest.MonkeyPatch
):
    def ignores_the_layout(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: object, **_: object
    ) -> tuple[torch.Tensor, None]:
        return attention.packed_attention(module, query, key, *rest, layout=None)  # type: ignore[arg-type]

    policy = PolicyModel(load_model(model_path))
    check_model(policy, CPU)
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping, attention.ATTENTION, ignores_the_layout
    )
    with pytest.raises(ConfigError, match="sequences see each other"):
        check_model(policy, CPU)


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path):
    path = save(GraniteConfig(**SHAPE, logits_scaling=0.1, embedding_multiplier=10), tmp_path)
    with pytest.raises(ConfigError, match="more to its logits"):
        check_model(PolicyModel(load_model(path)), CPU)


def test_a_model_with_capped_attention_is_refused(tmp_path: Path):
    path = save(AutoConfig.for_model("gemma2", **SHAPE), tmp_path)
    with pytest.raises(ConfigError, match="softcap"):
        check_model(PolicyModel(load_model(path)), CPU)


def test_a_model_without_attention_is_refused(tmp_path: Path):
    path = save(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1), tmp_path)
    with pytest.raises(ArealiteError, match="attention"):
        check_model(PolicyModel(load_model(path)), CPU)


def test_a_folder_that_is_no_model_is_refused_with_its_name(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=str(tmp_path)):
        load_model(str(tmp_path))
