"""Who reads a model's files when several ranks train it, and what that takes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

from arealite.testing import make_tiny_model
from tests.training.helpers import save_random_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of 250 MB, in blocks of 60. transformers merges its experts, which takes memory."""
    config = Qwen3MoeConfig(
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_experts=20,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=256,
        dtype=torch.float32,
    )
    return save_random_model(config, tmp_path_factory.mktemp("large"))


def ranks(number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), "-m", "tests.training.loading_ranks", *arguments]
    # By itself glibc keeps blocks of 20 MB that were freed, some of the time: peaks then differ.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def one_and_two_ranks(model: str, folder: Path) -> list[list[dict[str, Any]]]:
    """Figures of the ranks of two runs, which go on at the same time."""

    def run(number: int) -> list[dict[str, Any]]:
        file = folder / f"{number}.json"
        done = ranks(number, model, str(file))
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(file.read_text())

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, (1, 2)))


def test_only_rank_0_reads_files_and_the_others_never_hold_the_whole_model(
    large_model: str, tmp_path: Path
):
    [alone], (first, second) = one_and_two_ranks(large_model, tmp_path)
    assert [rank["has_read"] for rank in (alone, first, second)] == [True, True, False]
    assert first["sum"] == second["sum"] == pytest.approx(alone["sum"], rel=1e-12)
    size = alone["model_mb"]
    assert first["peak_mb"] > size
    assert second["peak_mb"] < 0.5 * size + 70  # its shards, and one and a half of the largest


def deepseek(folder: Path) -> str:
    """In half precision, but for a buffer of its experts' biases, which stays in float32."""
    config = DeepseekV3Config(
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(folder)
    return str(folder)


def contradictory(folder: Path) -> str:
    """Its config ties head and embedding, which differ in its file."""
    make_tiny_model(folder, is_tied=False)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": True}))
    return str(folder)


@pytest.mark.parametrize("make", [deepseek, contradictory])
def test_two_ranks_have_the_tensors_of_one(make: Callable[[Path], str], tmp_path: Path):
    [alone], both = one_and_two_ranks(make(tmp_path / "model"), tmp_path)
    assert [figures["tensors"] for figures in both] == [alone["tensors"]] * 2


def test_a_model_that_cannot_be_loaded_ends_all_ranks_with_its_reason(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    run = ranks(2, str(tmp_path), str(tmp_path / "out.json"))
    assert run.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: DataError: '{tmp_path}' could not be loaded" in run.stdout
