"""The trainer's benchmark: its arithmetic by hand, and one run on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_trainer import flops_per_token, main

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> dict:
    command = [sys.executable, "benchmarks/gpu_trainer.py", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_flops_of_a_token_are_those_counted_by_hand():
    # tiny: per block 64*64 + 2 * 64*32 + 64*64 of attention and 3 * 64*128, twice; head 64*320
    weights = 2 * (4096 + 4096 + 4096 + 24576) + 20480
    assert flops_per_token("tiny", 100) == 6 * weights + 6 * 2 * 64 * 100
    # Qwen3-0.6B has 596 million weights; norms are not matrices, and the head is its embedding
    assert flops_per_token("qwen3-0.6b", 0) / 6 == pytest.approx(596e6, rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_that_nothing_was_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["gpu_trainer.py"])
    main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"device": "none"}


def test_a_tiny_model_is_measured_anywhere():
    figures = run("--shape", "tiny", "--tokens", "256", "--lengths", "64", "128")
    cells = {f"{kind}_256x{length}" for kind in ("sft", "rl") for length in (64, 128)}
    assert figures.keys() == {"device", "matrix_tflops"} | cells
    assert all(figures[cell]["tokens_per_s"] > 0 for cell in cells)
