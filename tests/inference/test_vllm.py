"""The client against real vLLM servers, one with a tied head and one with its own."""

import asyncio
import time
import urllib.request

import pytest

from arealite import background
from arealite.data import load_tokenizer
from arealite.errors import PromptTooLongError, ServerError
from arealite.inference.vllm import VLLMEngine
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.workflows import ChatWorkflow
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.inference.parity import (
    LIMIT,
    Reference,
    Weights,
    assert_agrees_after_each_of_three_pushes,
    checkpoint,
    gap,
    generate,
    make_prompts,
    perturbed,
    push,
)
from tests.rollout.agents import CalculatorAgent, TalkativeAgent


def test_server_and_trainer_agree_after_each_push(engine: VLLMEngine, tiny_model: str):
    assert_agrees_after_each_of_three_pushes(engine, tiny_model)


def test_every_token_names_its_weights_when_pushes_come_in_mid_generation(
    engine: VLLMEngine, vllm_address: str, tiny_model: str
):
    weights = {v: perturbed(checkpoint(tiny_model), seed=10 + v) for v in range(4)}
    reference, prompts = Reference(tiny_model), make_prompts(16, seed=1)
    seen: set[int] = set()
    for _ in range(5):  # a busy machine may hear a pause only when the generation is over
        push(engine, weights[0], 0)
        responses = generate_through_pushes(engine, vllm_address, prompts, weights)
        for response in responses:
            assert len(response.versions) == len(response.token_ids)
            assert response.versions == sorted(response.versions)
        assert gap(reference, weights, prompts, responses, 1.0) <= LIMIT
        seen = {version for response in responses for version in response.versions}
        if seen == {0, 1, 2, 3}:
            return
    raise AssertionError(f"three pushes in mid-generation, but only the versions {seen}")


def generate_through_pushes(
    engine: VLLMEngine, address: str, prompts: list[list[int]], weights: dict[int, Weights]
) -> list[ModelResponse]:
    """Long responses, while versions 1, 2, ... arrive after every 320 tokens."""

    async def generate_all() -> list[ModelResponse]:
        sampling = SamplingParams(max_new_tokens=480)
        requests = [ModelRequest(token_ids=prompt, sampling=sampling) for prompt in prompts]
        return list(await asyncio.gather(*map(engine.agenerate, requests)))

    before = tokens_sampled(address)
    running = background.submit(generate_all())
    for version in sorted(weights)[1:]:
        while tokens_sampled(address) < before + version * 320 and not running.done():
            time.sleep(0.01)
        push(engine, weights[version], version)
    return running.result(120)


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


class Recorder:
    """An engine that remembers what it asked the server and what came back."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self.exchanges: list[tuple[ModelRequest, ModelResponse]] = []

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        response = await self._engine.agenerate(request)
        self.exchanges.append((request, response))
        return response


@pytest.mark.parametrize("agent_class", [CalculatorAgent, TalkativeAgent])
def test_an_agents_trajectories_are_token_for_token_what_the_server_saw(
    engine: VLLMEngine, tiny_model: str, agent_class: type[ChatWorkflow]
):
    push(engine, checkpoint(tiny_model), 7)
    recorder = Recorder(engine)
    sampling = SamplingParams(max_new_tokens=24)
    agent = agent_class(load_tokenizer(tiny_model), gsm8k_reward, sampling, group_size=1)
    row = {"question": "What is half of 48?", "answer": "#### 24"}
    for _ in range(4):
        recorder.exchanges.clear()
        episode = agent.arun_episode(recorder, row)  # type: ignore[arg-type]
        group = background.run(episode, timeout_s=120, what="an episode")
        assert group is not None
        [trajectory] = group
        expected = [False] * len(trajectory.token_ids)
        for request, response in recorder.exchanges:
            start, end = len(request.token_ids), len(request.token_ids + response.token_ids)
            assert trajectory.token_ids[:end] == request.token_ids + response.token_ids
            assert trajectory.behavior_logprobs[start:end] == response.behavior_logprobs
            assert trajectory.versions[start:end] == response.versions == [7] * (end - start)
            expected[start:end] = [True] * (end - start)
        assert trajectory.loss_mask == expected
