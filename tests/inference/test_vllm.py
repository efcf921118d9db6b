"""The client against real vLLM servers, one with a tied head and one with its own."""

import asyncio
import random
import time
import urllib.request

import pytest

from arealite import background
from arealite.errors import PromptTooLongError, ServerError
from arealite.inference.vllm import VLLMEngine
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.inference.parity import Reference, checkpoint, gap, generate, perturbed, push

LIMIT = 0.005
"""Greatest mean |server - trainer| log-prob that bf16 rounding explains."""


def make_prompts(count: int, *, length: int = 24, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(3, 259) for _ in range(length)] for _ in range(count)]


def test_server_and_trainer_agree_after_each_push(engine: VLLMEngine, tiny_model: str):
    reference, prompts = Reference(tiny_model), make_prompts(16)
    for version in range(3):
        weights = perturbed(checkpoint(tiny_model), seed=version)
        push(engine, weights, version)
        for temperature in (1.0, 0.7):
            sampling = SamplingParams(temperature=temperature, max_new_tokens=32)
            responses = generate(engine, prompts, sampling)
            assert {v for response in responses for v in response.versions} == {version}
            measured = gap(reference, {version: weights}, prompts, responses, temperature)
            assert measured <= LIMIT


def test_every_token_names_its_weights_when_pushes_come_in_mid_generation(
    engine: VLLMEngine, vllm_address: str, tiny_model: str
):
    weights = {v: perturbed(checkpoint(tiny_model), seed=10 + v) for v in range(4)}
    push(engine, weights[0], 0)
    prompts = make_prompts(16, seed=1)
    generate(engine, prompts, SamplingParams(max_new_tokens=2))

    async def generate_all() -> list[ModelResponse]:
        sampling = SamplingParams(max_new_tokens=480)
        requests = [ModelRequest(token_ids=prompt, sampling=sampling) for prompt in prompts]
        return list(await asyncio.gather(*map(engine.agenerate, requests)))

    sampled = tokens_sampled(vllm_address)
    running = background.submit(generate_all())
    for version in (1, 2, 3):
        while tokens_sampled(vllm_address) < sampled + version * 16 * 20:
            time.sleep(0.01)
        push(engine, weights[version], version)
    responses = running.result(120)

    for response in responses:
        assert len(response.versions) == len(response.token_ids)
        assert response.versions == sorted(response.versions)
    assert {version for response in responses for version in response.versions} == {0, 1, 2, 3}
    assert gap(Reference(tiny_model), weights, prompts, responses, 1.0) <= LIMIT


def tokens_sampled(address: str) -> float:
    """The server's own count of all tokens it has sampled."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    counts = [line for line in lines if line.startswith("vllm:generation_tokens_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in counts)


def test_a_prompt_served_before_an_update_is_served_with_the_new_weights_after_it(
    engine: VLLMEngine, tiny_model: str
):
    reference, prompts = Reference(tiny_model), make_prompts(8, length=64, seed=2)
    sampling = SamplingParams(max_new_tokens=16)
    for version in (0, 1):
        weights = perturbed(checkpoint(tiny_model), seed=20 + version)
        push(engine, weights, version)
        responses = generate(engine, prompts, sampling)
        assert gap(reference, {version: weights}, prompts, responses, 1.0) <= LIMIT


def test_greedy_repeats_itself(engine: VLLMEngine, tiny_model: str):
    push(engine, checkpoint(tiny_model), 5)
    sampling = SamplingParams(max_new_tokens=16).greedy()
    [prompt] = make_prompts(1)
    first, second = (generate(engine, [prompt], sampling)[0].token_ids for _ in range(2))
    assert first == second


def test_a_prompt_that_fills_the_context_is_refused(engine: VLLMEngine):
    request = ModelRequest(token_ids=[5] * engine.max_model_len, sampling=SamplingParams())
    with pytest.raises(PromptTooLongError, match="leaves no room in a context of 512"):
        asyncio.run(engine.agenerate(request))


def test_a_response_cut_by_the_context_says_so(engine: VLLMEngine, tiny_model: str):
    push(engine, checkpoint(tiny_model), 6)
    sampling = SamplingParams(max_new_tokens=64)
    [response] = generate(engine, make_prompts(1, length=500), sampling)
    assert response.finish_reason in ("context", "stop")
    assert len(response.token_ids) <= 12


def test_an_address_where_nobody_answers_is_named_with_what_to_do():
    with pytest.raises(ServerError, match=r"No vLLM server answered at http://127.0.0.1:9 .*serve"):
        VLLMEngine(["http://127.0.0.1:9"])
