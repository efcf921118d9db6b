"""What the trainer does on CUDA alone: its kernels, half precision, memory, and NCCL."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arealite import dist
from arealite.testing import make_tiny_model
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.logprobs import packed_logprobs
from tests.training.helpers import (
    CFG,
    minibatch_of,
    relative_difference,
    step_gradient,
    train_step,
)

pytestmark = pytest.mark.gpu
FLOAT32 = replace(CFG, dtype="float32")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("qwen2"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def leave_the_process_group() -> Iterator[None]:
    yield
    dist.close()


def test_tiled_log_probs_are_those_of_the_cpu():
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 64), torch.randn(5_000, 64)
    token_ids, is_first = torch.randint(5_000, (300,)), torch.arange(300) % 100 == 0
    temperature, upstream = torch.rand(300) + 0.5, torch.randn(300)

    def outcome(device: str) -> dict[str, torch.Tensor]:
        given = [x.to(device).requires_grad_() for x in (hidden, head)]
        others = [x.to(device) for x in (token_ids, temperature, is_first)]
        logprobs, entropy = packed_logprobs(*given, *others)
        gradients = torch.autograd.grad(logprobs, given, upstream.to(device))
        found = [logprobs, entropy, *gradients]
        names = ("logprobs", "entropy", "hidden", "head")
        return {name: value.detach().cpu() for name, value in zip(names, found, strict=True)}

    assert relative_difference(outcome("cuda"), outcome("cpu")) < 1e-4


def test_a_step_in_float32_has_the_gradient_of_the_cpu(model_path: str):
    on_gpu, stats = step_gradient(FSDPEngine(model_path, FLOAT32), minibatch_of(max_tokens=64))
    dist.close()
    code = (
        "import sys, torch\n"
        "from arealite.training.fsdp import FSDPEngine\n"
        "from tests.gpu.test_trainer import FLOAT32\n"
        "from tests.training.helpers import minibatch_of, step_gradient\n"
        "engine = FSDPEngine(sys.argv[1], FLOAT32)\n"
        "torch.save(step_gradient(engine, minibatch_of())[0], sys.argv[2])\n"
    )
    file = Path(model_path) / "gradient.pt"
    run = [sys.executable, "-c", code, model_path, str(file)]
    subprocess.run(run, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True, timeout=300)
    found = {name: gradient.cpu() for name, gradient in on_gpu.items()}
    assert relative_difference(found, torch.load(file)) < 1e-4
    assert not stats.skipped


def test_half_precision_is_the_default_and_close_to_float32(model_path: str):
    with FSDPEngine(model_path, FLOAT32) as exact, FSDPEngine(model_path, CFG) as half:
        expected, found = (torch.cat(e.logprobs(minibatch_of())) for e in (exact, half))
        train_step(half, minibatch_of())
        dtypes = {state["exp_avg"].dtype for state in half._optimizer.state.values()}
    assert 0 < (found - expected).abs().mean() < 0.03
    assert dtypes == {torch.float32}


def test_offload_leaves_no_weights_on_the_gpu_and_the_same_gradient(model_path: str):
    def outcome(cfg: FSDPConfig) -> tuple[int, dict[str, torch.Tensor]]:
        before = torch.cuda.memory_allocated()
        with FSDPEngine(model_path, cfg) as engine:
            taken = torch.cuda.memory_allocated() - before
            gradient, _ = step_gradient(engine, minibatch_of(max_tokens=64))
        return taken, {name: value.cpu() for name, value in gradient.items()}

    taken, expected = outcome(FLOAT32)
    taken_offloaded, found = outcome(replace(FLOAT32, cpu_offload=True))
    assert taken_offloaded < 0.2 * taken
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"lora_rank": 4},
        {"lora_rank": 4, "dtype": "auto"},
        {"optimizer_offload": True},
        {"cpu_offload": True},
    ],
)
def test_a_run_continued_from_a_checkpoint_takes_the_same_next_step(
    model_path: str, tmp_path: Path, options: dict
):
    cfg = replace(FLOAT32, **options)
    with FSDPEngine(model_path, cfg) as engine:
        train_step(engine, minibatch_of())
        engine.save(tmp_path)
        train_step(engine, minibatch_of())
        expected = torch.cat(engine.logprobs(minibatch_of()))
    with FSDPEngine(model_path, cfg) as again:
        again.load(tmp_path)
        train_step(again, minibatch_of())
        torch.testing.assert_close(
            torch.cat(again.logprobs(minibatch_of())), expected, rtol=1e-3, atol=1e-3
        )


def test_states_of_the_optimizer_are_on_the_gpu_only_in_its_step(model_path: str):
    def outcome(cfg: FSDPConfig) -> tuple[set[str], list[torch.Tensor], int]:
        before = torch.cuda.memory_allocated()
        with FSDPEngine(model_path, cfg) as engine:
            for _ in range(3):
                train_step(engine, minibatch_of())
            taken = torch.cuda.memory_allocated() - before
            states = [value for s in engine._optimizer.state.values() for value in s.values()]
            return {v.device.type for v in states}, engine.logprobs(minibatch_of()), taken

    devices, expected, taken = outcome(FLOAT32)
    devices_elsewhere, found, taken_elsewhere = outcome(replace(FLOAT32, optimizer_offload=True))
    assert (devices, devices_elsewhere) == ({"cuda"}, {"cpu"})
    torch.testing.assert_close(torch.cat(found), torch.cat(expected))
    assert taken_elsewhere < 0.6 * taken  # weights alone, where they were a third


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl_have_the_gradient_norm_of_one(model_path: str, tmp_path: Path):
    def norm(ranks: int) -> float:
        file = tmp_path / f"{ranks}.json"
        run = [*(sys.executable, "-m", "torch.distributed.run", "--standalone")]
        run += ["--nproc-per-node", str(ranks), "-m", "tests.gpu.one_step", model_path, str(file)]
        subprocess.run(run, check=True, timeout=300)
        return json.loads(file.read_text())["grad_norm"]

    assert norm(2) == pytest.approx(norm(1), rel=1e-3)
