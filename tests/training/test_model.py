from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from arealite.errors import ConfigError, DataError
from arealite.testing import make_tiny_model
from arealite.training import attention
from arealite.training.model import PolicyModel, blocks, load_model
from arealite.types import MicroBatch
from tests.training.helpers import (
    SHAPE,
    VOCABULARY,
    plain_logprobs,
    plain_model,
    relative_difference,
    save_random_model,
    sequences,
)

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
RAGGED = [5, 31, 1, 17, 2, 18, 40, 3]

# The windows are shorter than most sequences; of the two layers one has a window and one has not.
FAMILIES = {
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "llama": {},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
    },
    "qwen3_moe": EXPERTS,
}


def packed(lengths: list[int]) -> MicroBatch:
    """Random tokens; every other sequence was sampled at another temperature."""
    generator = torch.Generator().manual_seed(sum(lengths))
    num_tokens = sum(lengths)
    zeros = torch.zeros(num_tokens)
    return MicroBatch(
        # Not 0: some families make its embedding 0, and a norm of it has a huge gradient.
        token_ids=torch.randint(1, VOCABULARY, (num_tokens,), generator=generator),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        loss_mask=zeros.bool(),
        behavior_logprobs=zeros,
        versions=zeros.long(),
        temperature=torch.cat([torch.full((n,), (1.0, 0.6)[i % 2]) for i, n in enumerate(lengths)]),
        advantages=zeros,
        loss_weight=zeros,
    )


def one_by_one(model: PreTrainedModel, mb: MicroBatch) -> torch.Tensor:
    return torch.cat(
        [
            plain_logprobs(model, list(ids), temperature.tolist())
            for ids, temperature in sequences(mb, mb.temperature)
        ]
    )


@contextmanager
def input_embeddings(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What comes out of the model's embedding, [1, L, H] of each forward, keeping its gradient."""
    found: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        found.append(output)

    hook = model.get_input_embeddings().register_forward_hook(keep)
    yield found
    hook.remove()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


def all_gradients(
    model: PreTrainedModel, logprobs: torch.Tensor, embedded: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of every weight and of every token's embedding, for the same random upstream gradient."""
    model.zero_grad()
    upstream = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    (logprobs * upstream).sum().backward()
    of_tokens = [tensor.grad[0] for tensor in embedded if tensor.grad is not None]
    assert len(of_tokens) == len(embedded)
    return {**gradients(model), "input embeddings": torch.cat(of_tokens)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random float32 model."""
    config = AutoConfig.for_model(
        request.param.removesuffix("-sliding"), **SHAPE, **FAMILIES[request.param]
    )
    return save_random_model(config, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def pair(family: str) -> tuple[PolicyModel, PreTrainedModel]:
    """A model with packed attention, and as transformers runs it."""
    return PolicyModel(load_model(family)), plain_model(family)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6).filter(lambda x: max(x) > 1))
def test_packed_log_probs_and_all_gradients_equal_those_of_one_sequence_at_a_time(
    pair: tuple[PolicyModel, PreTrainedModel], lengths: list[int]
):
    policy, reference = pair
    mb = packed(lengths)
    with input_embeddings(policy.model) as embedded, input_embeddings(reference) as alone:
        found, expected = policy(mb)[0], one_by_one(reference, mb)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradient = all_gradients(policy.model, found, embedded)
        wanted = all_gradients(reference, expected, alone)
    assert gradient.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # The key's bias shifts all scores of a query alike, so its gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            assert (gradient[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_changing_one_sequence_changes_only_its_own_log_probs_and_gradients(
    pair: tuple[PolicyModel, PreTrainedModel],
):
    policy, _ = pair
    before, after = packed(RAGGED), packed(RAGGED)
    start, end = before.cu_seqlens[3:5].tolist()
    inside = torch.zeros(len(before.token_ids), dtype=torch.bool)
    inside[start:end] = True
    after.token_ids[inside] = (after.token_ids[inside] + 1) % VOCABULARY
    results = []
    for mb in (before, after):
        with input_embeddings(policy.model) as embedded:
            logprobs = policy(mb)[0]
            gradient = all_gradients(policy.model, logprobs, embedded)["input embeddings"]
        results.append((logprobs.detach(), gradient))
    (first, first_gradient), (second, second_gradient) = results
    # All but the first token of the changed sequence, which has no log-prob.
    assert (first[inside] != second[inside]).sum() == end - start - 1
    # Bit for bit, but for experts: they take their tokens as one matrix, whose number of rows
    # decides how a matrix product adds up.
    atol = 1e-6 if "Moe" in type(policy.model).__name__ else 0.0
    torch.testing.assert_close(first[~inside], second[~inside], rtol=0, atol=atol)
    torch.testing.assert_close(first_gradient[~inside], second_gradient[~inside], rtol=0, atol=atol)


def test_the_balance_loss_of_experts_is_no_part_of_the_gradient(tmp_path: Path):
    config = AutoConfig.for_model(
        "qwen3_moe", **SHAPE, **EXPERTS, output_router_logits=True, router_aux_loss_coef=10.0
    )
    path = save_random_model(config, tmp_path)
    policy, reference = PolicyModel(load_model(path)), plain_model(path)
    mb = packed(RAGGED)
    with input_embeddings(policy.model) as embedded, input_embeddings(reference) as alone:
        found = all_gradients(policy.model, policy(mb)[0], embedded)
        expected = all_gradients(reference, one_by_one(reference, mb), alone)
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_type": "dynamic", "factor": 4.0},
        {
            "model_type": "phi3",
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    ],
    ids=lambda config: config["rope_type"],
)
def test_sequences_for_which_a_rotary_embedding_looks_at_others_are_refused(
    config: dict[str, Any], tmp_path: Path
):
    rope = {"rope_theta": 10_000.0, **config}
    model_type = rope.pop("model_type")
    shape = SHAPE | {"hidden_size": 32, "head_dim": 8, "pad_token_id": 0}
    described = AutoConfig.for_model(
        model_type,
        **shape,
        max_position_embeddings=64 if model_type == "phi3" else 16,
        original_max_position_embeddings=16,
        rope_parameters=rope,
    )
    path = save_random_model(described, tmp_path)
    policy = PolicyModel(load_model(path))
    short = packed([5, 16, 9])
    with torch.no_grad():
        expected = one_by_one(plain_model(path), short)
        torch.testing.assert_close(policy(short)[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ConfigError, match=r"of 17 tokens cannot be packed .* beyond 16, the rotary"
    ):
        policy(packed([5, 17, 9]))


def missing_one(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_model(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_one, r"lack 1 of the model's tensors, such as model.layers.1.mlp.up_proj.weight"),
        (of_another_model, r"lack \d+ of the model's tensors, such as"),
        (of_another_shape, "could not be loaded as a causal language model"),
        (cut, "could not be loaded as a causal language model"),
    ],
)
def test_files_without_the_weights_of_the_model_are_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
):
    path = make_tiny_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_model(path)


def test_train_mode_has_no_dropout(tmp_path: Path):
    config = OPTConfig(**OPT, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    policy = PolicyModel(load_model(save_random_model(config, tmp_path)))
    expected, _ = policy(packed(RAGGED))
    found, _ = policy.train()(packed(RAGGED))
    assert torch.equal(found, expected)


def test_blocks_that_contain_blocks_are_sharded_once():
    config = AutoConfig.for_model("mbart", vocab_size=64, d_model=32, decoder_layers=3)
    found = blocks(AutoModelForCausalLM.from_config(config))
    assert [type(block).__name__ for block in found] == ["MBartDecoderLayer"] * 3


@pytest.mark.parametrize("padding", [1.0, 1.1, 100.0])
def test_padding_inside_of_attention_changes_nothing(
    padding: float, model_path: str, monkeypatch: pytest.MonkeyPatch
):
    mb = packed(RAGGED)
    policy = PolicyModel(load_model(model_path))
    expected = one_by_one(plain_model(model_path), mb)
    monkeypatch.setattr(attention, "PADDING", padding)
    with torch.no_grad():
        torch.testing.assert_close(policy(mb)[0], expected, rtol=1e-5, atol=1e-5)


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


def test_a_folder_that_is_no_model_is_refused_with_its_name(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=str(tmp_path)):
        load_model(str(tmp_path))


def test_a_model_that_is_not_causal_is_refused_by_its_folder(tmp_path: Path):
    T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="causal language model"):
        load_model(str(tmp_path))


def test_a_model_that_chooses_its_attention_from_its_own_list_is_refused(tmp_path: Path):
    config = FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True
    )
    with pytest.raises(ConfigError, match="AttentionInterface"):
        load_model(save_random_model(config, tmp_path))
