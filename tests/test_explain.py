"""Expected numbers are worked out by hand in the comments."""

import json
import re
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch

from arealite import data
from arealite import explain as explanation
from arealite.errors import DataError
from arealite.explain import explain
from arealite.training.logprobs import TILE_WIDTH
from arealite.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Rollout:
    prompts_per_step: int = 16
    max_staleness: int = 2
    max_running_prompts: int = 0


@dataclass(frozen=True, kw_only=True)
class Train:
    micro_batch_tokens: int = 1000
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    lora_rank: int = 0
    lora_layers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "nowhere"
    steps: int = 80
    group_size: int = 8
    minibatches: int = 3
    sampling: SamplingParams = SamplingParams(max_new_tokens=64)
    rollout: Rollout = Rollout()
    train: Train = Train()


@pytest.fixture(autouse=True)
def unreachable(monkeypatch):
    """No model can be read, unless a test says where it is; no ranks but this one."""

    def resolve(name: str) -> str:
        raise DataError(f"There is no model {name}.")

    monkeypatch.setattr(data, "resolve_model", resolve)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    """A Qwen2 config without weights: hidden 8, 2 layers, 50 words, context 32."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 50,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(data, "resolve_model", lambda name: str(tmp_path))


def table(cfg: object) -> dict[str, str]:
    """Section and label to value and note, with line breaks taken out."""
    rows: dict[str, str] = {}
    for block in explain(cfg).split("\n\n"):
        title, *lines = block.split("\n")
        for line in re.sub(r"\n {9,}", " ", "\n".join(lines)).split("\n"):
            label, _, rest = line.strip().partition("  ")
            rows[f"{title.split()[0]}: {label}"] = re.sub(r" {2,}", " | ", rest.strip())
    return rows


def test_a_step_goes_from_prompts_to_optimizer_steps(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = table(Config())
    assert rows["One: prompts"] == "16 | rollout.prompts_per_step; 8 per rank"
    assert rows["One: sequences"] == "128 | 16 prompts x group_size 8"
    assert rows["One: response tokens, at most"] == "8,192 | x sampling.max_new_tokens 64"
    assert rows["One: prompt tokens"].startswith("unknown")
    # 128 in 3 parts: 42, 43, 43; of 43 one rank gets 22.
    assert rows["One: sequences per minibatch"] == "43 | at most 22 on one rank"
    # 15 responses of 64 are 960 tokens; 22 of them need two micro-batches.
    assert rows["One: micro-batches, without prompts"].startswith("2 | per rank and minibatch: 15")
    assert rows["One: optimizer steps"].startswith("3 |")


def test_prompts_that_do_not_divide_by_the_ranks_are_pointed_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "DOES NOT DIVIDE by 3 ranks" in table(Config())["One: prompts"]


def test_a_response_that_cannot_fit_a_micro_batch_is_pointed_out():
    rows = table(Config(train=Train(micro_batch_tokens=64)))
    assert rows["One: longest response"].startswith("64 | DOES NOT FIT")
    assert not any("micro-batches" in label for label in rows)


def test_steps_on_rows_or_on_pairs_are_counted_like_those_on_prompts():
    @dataclass(frozen=True, kw_only=True)
    class Supervised:
        steps: int = 40
        rows_per_step: int = 32

    @dataclass(frozen=True, kw_only=True)
    class Preferences:
        steps: int = 30
        pairs_per_step: int = 16

    rows = table(Supervised())
    assert rows["One: rows"] == "32 | rows_per_step; 32 per rank"
    assert rows["The: rows"] == "1,280 | the data set is repeated if it has fewer"
    assert table(Preferences())["The: pairs"].startswith("480 |")


def test_stages_have_budgets_of_their_own():
    @dataclass(frozen=True, kw_only=True)
    class Staged(Config):
        stages: tuple[tuple[int, int], ...] = ((10, 16), (30, 32))

    # 10 steps of 128 sequences of at most 16 tokens, 20 of 32 and 50 of 64.
    assert table(Staged())["The: generated tokens, at most"] == (
        f"{128 * (10 * 16 + 20 * 32 + 50 * 64):,} | stages: 10 steps x 16, 20 steps x 32, "
        "50 steps x 64"
    )


def test_a_critic_is_a_second_model_beside_the_first(model_folder):
    @dataclass(frozen=True, kw_only=True)
    class WithCritic(Config):
        critic: Train = Train()

    rows = table(WithCritic())
    [critic, policy] = [rows[f"Memory: {row}"] for row in ("critic, per rank", "sum per rank")]
    assert critic.split(" | ")[0] == policy.split(" | ")[0]


def test_a_critic_of_adapters_takes_what_its_own_settings_say(model_folder):
    @dataclass(frozen=True, kw_only=True)
    class WithCritic(Config):
        critic: Train = Train(lora_rank=2)

    alone = table(Config(train=Train(lora_rank=2)))["Memory: sum per rank"].split(" | ")[0]
    assert table(WithCritic())["Memory: critic, per rank"].split(" | ")[0] == alone


def test_the_age_of_the_weights_is_bounded_in_versions_and_in_optimizer_steps():
    rows = table(Config())
    assert rows["Age: versions behind, at most"].startswith("2 |")
    # Two whole steps of 3 updates, and 2 updates of this step before its last minibatch.
    assert rows["Age: optimizer steps behind, at most"].startswith("8 |")
    # 3 batches of 16 prompts of 8.
    assert rows["Age: sequences in flight, at most"] == "384 | 48 prompts x group_size 8"


def test_a_synchronous_run_with_one_minibatch_is_never_behind():
    rows = table(Config(minibatches=1, rollout=Rollout(max_staleness=0, max_running_prompts=5)))
    assert rows["Age: versions behind, at most"].startswith("0 |")
    assert rows["Age: optimizer steps behind, at most"].startswith("0 |")
    assert rows["Age: sequences in flight, at most"] == "40 | 5 prompts x group_size 8"


def test_the_whole_run_is_the_steps_times_one_step():
    rows = table(Config())
    assert rows["The: training steps"].startswith("80 |")
    assert rows["The: optimizer steps"].startswith("240 |")
    assert rows["The: prompts"].startswith("1,280 |")
    assert rows["The: sequences"].startswith("10,240 |")
    assert rows["The: generated tokens, at most"].startswith("655,360 |")


@pytest.mark.usefixtures("model_folder")
def test_memory_follows_from_the_model_and_is_shared_by_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = table(Config(train=Train(micro_batch_tokens=2**20)))
    # Layer: q 8*8+8, k and v 2*(8*4+4), o 8*8, mlp 3*8*24, norms 2*8 = 800. Twice that, plus the
    # embedding 50*8 and the last norm 8.
    assert rows["Memory: parameters"] == "2,008 | nowhere"
    assert rows["Memory: weights"].startswith("0.0 MiB |")
    # 17 numbers of 4 bytes x 2 layers x 8 hidden x 2^20 tokens = 1088 MiB.
    assert rows["Memory: activations of a micro-batch"].startswith("1.1 GiB |")
    # 4 bytes x 50 words x 2^20 tokens.
    assert rows["Memory: logits of a micro-batch"].startswith("200.0 MiB |")
    assert rows["Memory: context of the model"].startswith("32 | TOO SHORT")


@pytest.mark.usefixtures("model_folder")
@pytest.mark.parametrize(("layers", "num_trained"), [((), "1,216"), (("q_proj",), "128")])
def test_lora_trains_its_adapters_alone(layers: tuple[str, ...], num_trained: str):
    rows = table(Config(train=Train(lora_rank=4, lora_layers=layers)))
    # Rows and columns: q and o 16 each, k and v 12 each, mlp 3 * 32 = 152. Of 2 layers, times 4.
    assert rows["Memory: trained parameters"].startswith(f"{num_trained} |")


@pytest.mark.usefixtures("model_folder")
def test_recomputing_and_bfloat16_take_less_memory():
    train = Train(micro_batch_tokens=2**20, dtype="bfloat16", activation_checkpointing=True)
    # (2 layer inputs + 17 of one layer) x 2 bytes x 8 hidden x 2^20 tokens = 304 MiB.
    row = table(Config(train=train))["Memory: activations of a micro-batch"]
    assert row.startswith("304.0 MiB |")


def test_logits_are_counted_as_they_are_made():
    assert explanation._COLUMNS == 2 * TILE_WIDTH


@dataclass(frozen=True, kw_only=True)
class Server:
    addresses: tuple[str, ...] = ()
    gpus: str = ""
    memory_share: float = 0.0
    sleep: bool = False
    transport: str = "auto"


@dataclass(frozen=True, kw_only=True)
class WithServer(Config):
    server: Server = Server()


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch, model_folder: None) -> None:
    """Of 2,000 MiB. A micro-batch of 2^20 tokens takes 1,088 + 200 MiB of it, the model nothing."""
    monkeypatch.setattr(explanation, "_gpu_bytes", lambda: 2_000 * 2**20)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def plan(server: Server, *, tokens: int = 2**20) -> dict[str, str]:
    rows = table(WithServer(server=server, train=Train(micro_batch_tokens=tokens)))
    return {key.removeprefix("A: "): row for key, row in rows.items() if key.startswith("A: ")}


@pytest.mark.usefixtures("one_gpu")
def test_a_shared_gpu_is_divided_among_server_and_trainer():
    rows = plan(Server())
    assert rows["server"] == "800.0 MiB | server.memory_share 0.4"
    # The weights and states of 2,008 parameters are 12 * 2,008 bytes = 0.02 MiB.
    assert rows["left while servers generate"].startswith("1.2 GiB |")
    assert rows["left while the trainer works"].startswith("none | TOO LITTLE, by 88.0 MiB: lower")


@pytest.mark.usefixtures("one_gpu")
def test_a_server_that_sleeps_leaves_its_memory_to_the_trainer():
    rows = plan(Server(sleep=True, memory_share=0.6))
    assert "sleeps while the trainer works" in rows["server"]
    assert rows["left while servers generate"].startswith("800.0 MiB |")
    assert rows["left while the trainer works"].startswith("712.0 MiB |")


@pytest.mark.usefixtures("one_gpu")
def test_weights_that_wait_on_the_gpu_for_servers_are_counted(monkeypatch: pytest.MonkeyPatch):
    size = replace(explanation._read_model_shape("A"), num_parameters=100 * 2**20)
    monkeypatch.setattr(explanation, "_model_shape", lambda _: size)
    left = {
        transport: plan(Server(transport=transport, memory_share=0.1), tokens=1)
        for transport in ("ipc", "shm")
    }
    assert left["ipc"]["weights for it"].startswith("200.0 MiB |")
    # 2,000 of the GPU, 200 of the server, 12 x 100 of weights and states
    assert left["shm"]["left while servers generate"].startswith("600.0 MiB |")
    assert left["ipc"]["left while servers generate"].startswith("400.0 MiB |")


def test_states_that_are_kept_elsewhere_come_for_the_optimizer_step_alone():
    sizes = {"weights": 100, "gradients": 10, "states": 60, "activations": 30, "logits": 5}
    here, elsewhere = (
        explanation._TrainerBytes(**sizes, ranks=2, is_offloaded=is_offloaded)
        for is_offloaded in (False, True)
    )
    assert (here.kept_per_rank, here.most_per_rank) == (80, 80 + 5 + 35)
    assert (elsewhere.kept_per_rank, elsewhere.most_per_rank) == (50, 50 + 5 + max(30, 35))


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("server", [Server(addresses=("http://a:1",)), Server(gpus="1")])
def test_a_gpu_that_nobody_shares_has_no_plan(server: Server):
    assert plan(server) == {}


def test_memory_of_a_real_size_is_sixteen_bytes_per_parameter_over_the_ranks(tmp_path, monkeypatch):
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(data, "resolve_model", lambda name: str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    rows = table(Config(model="Qwen/Qwen2.5-0.5B"))
    # The count on the model's card is 0.49B. 16 bytes x 494,032,768 / 4 = 1.84 GiB.
    assert rows["Memory: parameters"] == "494,032,768 | Qwen/Qwen2.5-0.5B"
    assert rows["Memory: weights"].startswith("1.8 GiB |")
    assert rows["Memory: AdamW states"].startswith("3.7 GiB |")
    assert rows["Memory: sum per rank"].startswith("1.8 GiB |")


def test_a_model_that_cannot_be_read_is_unknown_and_the_rest_is_explained():
    rows = table(Config())
    assert rows["Memory: parameters"] == (
        "unknown | nowhere cannot be read: There is no model nowhere."
    )
    assert "One: prompts" in rows


def test_a_config_of_another_recipe_leaves_lines_out():
    @dataclass(frozen=True, kw_only=True)
    class Warmstart:
        steps: int = 5
        group_size: str = "many"

    assert list(table(Warmstart())) == ["The: training steps"]
    assert explain(object()) == "This config has no knobs that other numbers follow from."


def test_the_table_fits_into_100_columns_whatever_the_numbers():
    cfg = Config(
        model="/long/" * 40,
        steps=10**9,
        group_size=10**6,
        rollout=Rollout(prompts_per_step=10**9, max_staleness=10**6),
    )
    assert max(map(len, explain(cfg).splitlines())) <= 100
