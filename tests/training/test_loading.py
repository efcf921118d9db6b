"""Who reads a model's files when several ranks train it, and what that takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

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
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def test_only_rank_0_reads_files_and_the_others_never_hold_the_whole_model(
    large_model: str, tmp_path: Path
):
    found: dict[int, list[dict[str, float]]] = {}
    for number in (1, 2):
        file = tmp_path / f"{number}.json"
        run = ranks(number, large_model, str(file))
        assert run.returncode == 0, run.stderr[-3000:]
        found[number] = json.loads(file.read_text())
    [alone], (first, second) = found[1], found[2]
    assert [rank["has_read"] for rank in (alone, first, second)] == [True, True, False]
    assert first["sum"] == second["sum"] == pytest.approx(alone["sum"], rel=1e-12)
    size = alone["model_mb"]
    assert first["peak_mb"] > size
    assert second["peak_mb"] < 0.5 * size + 70  # its shards, and one and a half of the largest


def test_a_model_that_cannot_be_loaded_ends_all_ranks_with_its_reason(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    run = ranks(2, str(tmp_path), str(tmp_path / "out.json"))
    assert run.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: DataError: '{tmp_path}' could not be loaded" in run.stdout
