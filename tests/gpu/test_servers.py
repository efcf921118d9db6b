"""vLLM servers on a GPU: weights that arrive, and the demo with trainer and server on one GPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.testing import make_tiny_model
from tests.inference.parity import assert_agrees_after_each_of_three_pushes
from tests.oracle import RecipeRun, recipe_runs

pytestmark = pytest.mark.gpu
pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RecipeRun]]:
    with recipe_runs(tmp_path) as start_with:
        yield start_with


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("transport", ["shm", "disk", "ipc"])
def test_server_and_trainer_agree_after_each_push(transport: Any, is_tied: bool, tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model", is_tied=is_tied)
    weights_dir = str(tmp_path / "weights") if transport == "disk" else ""
    gpus = "0" if transport == "ipc" else ""
    cfg = ServerConfig(transport=transport, weights_dir=weights_dir, gpus=gpus, memory_share=0.3)
    with serve(folder, cfg, log_dir=tmp_path) as servers, VLLMEngine(servers) as engine:
        assert_agrees_after_each_of_three_pushes(engine, folder)


@pytest.mark.parametrize("sleep", ["false", "true"], ids=["awake", "asleep"])
def test_the_demo_learns_with_trainer_and_server_on_one_gpu(
    start: Callable[..., RecipeRun], sleep: str
):
    run = start("server.gpus=0", f"server.sleep={sleep}", "gate.start_prompts=4")
    run.assert_ended(0, within_s=900)
    figures = json.loads(run.printed().splitlines()[-1])
    assert figures["accuracy_before"] <= 0.60
    assert figures["accuracy_after"] >= 0.90


def test_a_server_that_sleeps_gives_its_memory_back_and_answers_as_before(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model")
    cfg = ServerConfig(memory_share=0.3, sleep=True)
    with serve(folder, cfg, log_dir=tmp_path) as servers, VLLMEngine(servers) as engine:
        assert_agrees_after_each_of_three_pushes(engine, folder)
        free_awake, total = torch.cuda.mem_get_info()
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] - free_awake > 0.2 * total
        engine.resume()
        assert abs(torch.cuda.mem_get_info()[0] - free_awake) < 0.05 * total
        assert_agrees_after_each_of_three_pushes(engine, folder)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_weights_go_from_gpu_to_gpu_over_nccl(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model")
    cfg = ServerConfig(transport="nccl", gpus="1")
    with serve(folder, cfg, log_dir=tmp_path) as servers, VLLMEngine(servers) as engine:
        assert_agrees_after_each_of_three_pushes(engine, folder)


@two_gpus
def test_the_demo_learns_with_trainer_and_server_on_a_gpu_each(start: Callable[..., RecipeRun]):
    run = start("server.gpus=1")
    run.assert_ended(0, within_s=900)
    assert json.loads(run.printed().splitlines()[-1])["accuracy_after"] >= 0.90
