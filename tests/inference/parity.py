"""What server and trainer say about the same tokens, computed by plain transformers."""

import asyncio
import random

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arealite import background
from arealite.inference.vllm import VLLMEngine
from arealite.types import ModelRequest, ModelResponse, SamplingParams

Weights = dict[str, torch.Tensor]


def checkpoint(folder: str) -> Weights:
    return load_file(f"{folder}/model.safetensors")


def perturbed(weights: Weights, *, seed: int, scale: float = 0.3) -> Weights:
    """The weights with every tensor moved by `scale` of its own standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            tensor.float()
            + scale * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
        ).bfloat16()
        for name, tensor in weights.items()
    }


def push(engine: VLLMEngine, weights: Weights, version: int) -> None:
    engine.pause()
    try:
        engine.receive_weights(weights.items(), version=version)
    finally:
        engine.resume()


def generate(
    engine: VLLMEngine, prompts: list[list[int]], sampling: SamplingParams
) -> list[ModelResponse]:
    async def all_of_them() -> list[ModelResponse]:
        requests = [ModelRequest(token_ids=prompt, sampling=sampling) for prompt in prompts]
        return list(await asyncio.gather(*map(engine.agenerate, requests)))

    return background.run(all_of_them(), timeout_s=120, what="generation")


class Reference:
    """Log-probs by plain transformers, one sequence at a time, in float32."""

    def __init__(self, folder: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(
        self, weights: Weights, prompt: list[int], response: list[int], temperature: float
    ) -> torch.Tensor:
        named = {name: tensor.float() for name, tensor in weights.items()}
        self._model.load_state_dict(named, strict=False)
        with torch.no_grad():
            logits = self._model(torch.tensor([prompt + response])).logits[0]
        logprobs = torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1]
        return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def gap(
    reference: Reference,
    weights_of_version: dict[int, Weights],
    prompts: list[list[int]],
    responses: list[ModelResponse],
    temperature: float,
) -> float:
    """Mean |server - reference| log-prob, each token under the weights it names."""
    gaps: list[torch.Tensor] = []
    for prompt, response in zip(prompts, responses, strict=True):
        versions = torch.tensor(response.versions)
        for version in sorted(set(response.versions)):
            expected = reference.logprobs(
                weights_of_version[version], prompt, response.token_ids, temperature
            )
            measured = torch.tensor(response.behavior_logprobs)
            gaps.append((expected - measured).abs()[versions == version])
    return float(torch.cat(gaps).mean())


LIMIT = 0.005
"""Greatest mean |server - trainer| log-prob that bf16 rounding explains."""


def make_prompts(count: int, *, length: int = 24, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 259) for _ in range(length)] for _ in range(count)]


def assert_agrees_after_each_of_three_pushes(engine: VLLMEngine, folder: str) -> None:
    reference, prompts = Reference(folder), make_prompts(16)
    for version in range(3):
        weights = perturbed(checkpoint(folder), seed=version)
        push(engine, weights, version)
        for temperature in (1.0, 0.7):
            sampling = SamplingParams(temperature=temperature, max_new_tokens=32)
            responses = generate(engine, prompts, sampling)
            assert {v for response in responses for v in response.versions} == {version}
            assert gap(reference, {version: weights}, prompts, responses, temperature) <= LIMIT
