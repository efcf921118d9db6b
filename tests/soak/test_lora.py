"""LoRA from end to end: the demo with adapters, and what its exported model answers."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from arealite.data import load_rows, load_tokenizer
from arealite.inference.server import ServerConfig, serve
from arealite.rollout.transcript import Transcript
from arealite.types import ModelRequest, SamplingParams
from tests.oracle import RecipeRun, recipe_runs

pytestmark = pytest.mark.soak
NUM_PROMPTS = 32


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RecipeRun]]:
    with recipe_runs(tmp_path) as start_with:
        yield start_with


def test_lora_reaches_the_accuracy_of_the_demo_and_its_model_answers_alike_everywhere(
    start: Callable[..., RecipeRun], tmp_path: Path
):
    run = start("train.lora_rank=16", "train.lr=1e-3")
    run.assert_ended(0, within_s=560)
    figures = json.loads(run.printed().splitlines()[-1])
    assert figures["accuracy_before"] <= 0.60
    assert figures["accuracy_after"] >= 0.90

    folder = str(run.out_dir / "model")
    requests = greedy_requests(folder)
    with serve(folder, ServerConfig(dtype="float32"), log_dir=tmp_path) as servers:
        answers = [answer_of_vllm(servers.addresses[0], request) for request in requests]
    assert answers == answers_of_transformers(folder, requests)


def greedy_requests(folder: str) -> list[ModelRequest]:
    tokenizer = load_tokenizer(folder)
    rows = load_rows("arealite/gsm8k-mini", split="test")[:NUM_PROMPTS]
    sampling = SamplingParams(max_new_tokens=64).greedy()
    return [
        Transcript(tokenizer, [{"role": "user", "content": row["question"]}]).request(sampling)
        for row in rows
    ]


def answer_of_vllm(address: str, request: ModelRequest) -> list[int]:
    sampling = {"temperature": 0.0, "max_tokens": request.sampling.max_new_tokens}
    body = {"token_ids": request.token_ids, "sampling_params": sampling}
    asked = urllib.request.Request(
        f"{address}/inference/v1/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return json.load(reply)["choices"][0]["token_ids"]


def answers_of_transformers(folder: str, requests: list[ModelRequest]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers: list[list[int]] = []
    for request in requests:
        prompt = torch.tensor([request.token_ids])
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.sampling.max_new_tokens,
            do_sample=False,
        )
        answers.append(whole[0, prompt.shape[1] :].tolist())
    return answers
