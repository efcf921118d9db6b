"""The contract of `InferenceEngine`, the same for a vLLM server, a model here, and a script."""

import asyncio
import concurrent.futures
import math
from collections.abc import Iterator

import pytest

from arealite import background
from arealite.api import InferenceEngine
from arealite.data import load_tokenizer
from arealite.errors import PromptTooLongError, ServerError
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.workflows import ChatWorkflow
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.inference.conformance import (
    CONTEXT,
    ENGINES,
    MODEL_ENGINES,
    VOCABULARY,
    generate_through_pushes,
    running_engine,
    start,
    versions_seen,
    wait_until,
    wait_until_sampling,
)
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


@pytest.fixture(params=ENGINES)
def any_engine(request: pytest.FixtureRequest, tiny_model: str) -> Iterator[InferenceEngine]:
    with running_engine(request.param, request, tiny_model) as engine:
        yield engine


@pytest.fixture(params=MODEL_ENGINES)
def model_engine(request: pytest.FixtureRequest, tiny_model: str) -> Iterator[InferenceEngine]:
    with running_engine(request.param, request, tiny_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def weights(tiny_model: str) -> Weights:
    return checkpoint(tiny_model)


@pytest.fixture(scope="module")
def end_token_id(tiny_model: str) -> int:
    return int(load_tokenizer(tiny_model).eos_token_id)


# --- One request ----------------------------------------------------------------------------------


def test_every_token_has_an_id_a_log_prob_and_a_version(
    any_engine: InferenceEngine, weights: Weights
):
    push(any_engine, weights, 3)
    for response in generate(any_engine, make_prompts(16), SamplingParams(max_new_tokens=32)):
        length = len(response.token_ids)
        assert length == len(response.behavior_logprobs)
        assert response.versions == [3] * length
        assert all(0 <= token < VOCABULARY for token in response.token_ids)
        assert all(math.isfinite(value) and value < 1e-3 for value in response.behavior_logprobs)


@pytest.mark.parametrize("budget", [1, 2, 17])
def test_a_response_keeps_to_its_budget(any_engine: InferenceEngine, weights: Weights, budget: int):
    push(any_engine, weights, 0)
    sampling = SamplingParams(max_new_tokens=budget)
    lengths = [len(r.token_ids) for r in generate(any_engine, make_prompts(8), sampling)]
    assert max(lengths) == budget


def test_the_finish_reason_is_stop_at_an_end_token_and_length_without_one(
    any_engine: InferenceEngine, weights: Weights, end_token_id: int
):
    push(any_engine, weights, 0)
    responses = generate(any_engine, make_prompts(64), SamplingParams(max_new_tokens=64))
    for response in responses:
        if response.finish_reason == "stop":
            assert response.token_ids.index(end_token_id) == len(response.token_ids) - 1
        else:
            assert response.finish_reason == "length"
            assert len(response.token_ids) == 64
            assert end_token_id not in response.token_ids
    assert {response.finish_reason for response in responses} == {"stop", "length"}


def test_a_response_ends_behind_the_first_of_its_stop_texts(
    any_engine: InferenceEngine, weights: Weights, tiny_model: str
):
    push(any_engine, weights, 0)
    tokenizer = load_tokenizer(tiny_model)
    stop = ("o", "7", "e", " s")  # a random model says one of them sooner or later
    sampling = SamplingParams(max_new_tokens=200, stop=stop)
    stopped = 0
    # A server that is asked with half a character at the end sees the other half as its own text.
    prompts = [tokenizer.encode(f"What is {number} + 2?\n") for number in range(24)]
    for response in generate(any_engine, prompts, sampling):
        *before, text = [
            tokenizer.decode(response.token_ids[:end], skip_special_tokens=True)
            for end in range(len(response.token_ids) + 1)
        ]
        length = len(response.token_ids)
        assert length == len(response.behavior_logprobs) == len(response.versions)
        assert not any(end in part for part in before for end in stop)
        if any(text.endswith(end) for end in stop):
            assert response.finish_reason == "stop"
            stopped += 1
        else:
            assert response.token_ids[-1] == tokenizer.eos_token_id or length == 200
    assert stopped >= 12


def test_log_probs_of_a_response_that_a_text_ended_are_those_of_the_model(
    model_engine: InferenceEngine, weights: Weights, tiny_model: str
):
    push(model_engine, weights, 0)
    prompts = make_prompts(16, seed=4)
    sampling = SamplingParams(max_new_tokens=64, stop=("a", "1", "\u00e9"))
    responses = generate(model_engine, prompts, sampling)
    assert gap(Reference(tiny_model), {0: weights}, prompts, responses, 1.0) <= LIMIT


def test_greedy_repeats_itself(any_engine: InferenceEngine, weights: Weights):
    push(any_engine, weights, 5)
    sampling = SamplingParams(max_new_tokens=16).greedy()
    [prompt] = make_prompts(1)
    first, second = (generate(any_engine, [prompt], sampling)[0].token_ids for _ in range(2))
    assert first == second


def test_a_prompt_that_fills_the_context_is_refused(any_engine: InferenceEngine):
    request = ModelRequest(token_ids=[5] * CONTEXT, sampling=SamplingParams())
    with pytest.raises(PromptTooLongError, match=f"leaves no room in a context of {CONTEXT}"):
        asyncio.run(any_engine.agenerate(request))


def test_a_response_cut_by_the_context_says_so(any_engine: InferenceEngine, weights: Weights):
    push(any_engine, weights, 6)
    sampling = SamplingParams(max_new_tokens=64)
    responses = generate(any_engine, make_prompts(8, length=CONTEXT - 12), sampling)
    for response in responses:
        assert response.finish_reason == "stop" or len(response.token_ids) == 12
    assert {response.finish_reason for response in responses} - {"stop"} == {"context"}


def test_a_budget_that_ends_where_the_context_does_is_the_budget(
    any_engine: InferenceEngine, weights: Weights
):
    push(any_engine, weights, 6)
    sampling = SamplingParams(max_new_tokens=12)
    responses = generate(any_engine, make_prompts(8, length=CONTEXT - 12), sampling)
    assert {response.finish_reason for response in responses} - {"stop"} == {"length"}


@pytest.mark.parametrize(
    "token_ids", [[], [5, -1], [5, 10**6]], ids=["empty", "negative", "too large"]
)
def test_a_prompt_that_no_tokenizer_of_the_model_made_is_refused(
    model_engine: InferenceEngine, weights: Weights, token_ids: list[int]
):
    push(model_engine, weights, 0)
    request = ModelRequest(token_ids=token_ids, sampling=SamplingParams())
    with pytest.raises(ServerError):
        asyncio.run(model_engine.agenerate(request))
    [response] = generate(model_engine, make_prompts(1), SamplingParams(max_new_tokens=4))
    assert response.token_ids


# --- Many requests --------------------------------------------------------------------------------


def test_many_at_once_all_answer(any_engine: InferenceEngine, weights: Weights):
    push(any_engine, weights, 0)
    prompts = [prompt[: 8 + i % 16] for i, prompt in enumerate(make_prompts(96))]
    responses = generate(any_engine, prompts, SamplingParams(max_new_tokens=8))
    assert len(responses) == 96
    assert all(response.token_ids for response in responses)


def test_a_request_that_is_cancelled_leaves_the_others_alone(
    any_engine: InferenceEngine, weights: Weights
):
    push(any_engine, weights, 0)
    cancelled, *others = start(any_engine, make_prompts(8), max_new_tokens=200)
    wait_until_sampling(any_engine)
    was_running = cancelled.cancel()
    assert all(other.result(120).token_ids for other in others)
    assert cancelled.cancelled() == was_running


def test_requests_come_from_any_thread_and_event_loop(
    any_engine: InferenceEngine, weights: Weights
):
    push(any_engine, weights, 0)
    sampling = SamplingParams(max_new_tokens=32)
    request = ModelRequest(token_ids=make_prompts(1)[0], sampling=sampling)

    async def ask() -> ModelResponse:
        return await any_engine.agenerate(request)

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        elsewhere = [threads.submit(lambda: asyncio.run(ask())) for _ in range(2)]
        elsewhere.append(background.submit(ask()))
        responses = [asyncio.run(ask()), *(future.result(60) for future in elsewhere)]
    assert all(response.token_ids for response in responses)


def test_closing_twice_is_no_error(any_engine: InferenceEngine):
    any_engine.close()
    any_engine.close()


# --- New weights ----------------------------------------------------------------------------------


def test_after_a_push_every_new_token_is_of_its_version(
    any_engine: InferenceEngine, weights: Weights
):
    for version in (0, 1, 7):
        push(any_engine, weights, version)
        assert any_engine.version == version
        responses = generate(any_engine, make_prompts(4), SamplingParams(max_new_tokens=4))
        assert versions_seen(responses) == {version}


def test_every_token_names_its_weights_when_pushes_come_in_mid_generation(
    any_engine: InferenceEngine, weights: Weights
):
    seen: set[int] = set()
    for _ in range(5):  # a busy machine may hear a pause only when the generation is over
        responses = generate_through_pushes(
            any_engine, make_prompts(16, seed=1), dict.fromkeys(range(4), weights)
        )
        for response in responses:
            assert len(response.versions) == len(response.token_ids)
            assert response.versions == sorted(response.versions)
        seen = versions_seen(responses)
        if seen == {0, 1, 2, 3}:
            return
    raise AssertionError(f"three pushes in mid-generation, but only the versions {seen}")


def test_weights_may_come_without_a_pause(any_engine: InferenceEngine, weights: Weights):
    push(any_engine, weights, 0)
    running = start(any_engine, make_prompts(8), max_new_tokens=160)
    wait_until_sampling(any_engine)
    any_engine.receive_weights(weights.items(), version=1)
    responses = [response.result(120) for response in running]
    assert versions_seen(responses) <= {0, 1}
    assert all(response.versions == sorted(response.versions) for response in responses)
    [afterwards] = generate(any_engine, make_prompts(1), SamplingParams(max_new_tokens=4))
    assert versions_seen([afterwards]) == {1}


@pytest.mark.parametrize("is_slept_through", [True, False], ids=["weights", "resume"])
def test_an_engine_goes_on_after_its_sleep(
    any_engine: InferenceEngine, weights: Weights, is_slept_through: bool
):
    push(any_engine, weights, 0)
    running = start(any_engine, make_prompts(8), max_new_tokens=160)
    wait_until_sampling(any_engine)
    any_engine.sleep()
    late = start(any_engine, make_prompts(2, seed=1), max_new_tokens=4)
    if is_slept_through:
        any_engine.receive_weights(weights.items(), version=1)
    else:
        any_engine.resume()
    responses = [response.result(120) for response in [*running, *late]]
    assert versions_seen(responses) <= {0, 1}
    assert all(response.versions == sorted(response.versions) for response in responses)
    [afterwards] = generate(any_engine, make_prompts(1), SamplingParams(max_new_tokens=4))
    assert versions_seen([afterwards]) == {int(is_slept_through)}


def test_while_paused_no_request_ends_and_new_ones_queue(
    any_engine: InferenceEngine, weights: Weights
):
    push(any_engine, weights, 0)
    running = start(any_engine, make_prompts(8), max_new_tokens=200)
    wait_until_sampling(any_engine)
    any_engine.pause()
    try:
        # What had ended by then may still be on its way here.
        ended = concurrent.futures.wait(running, timeout=0.2).done
        queued = start(any_engine, make_prompts(4, seed=1), max_new_tokens=2)
        later = concurrent.futures.wait([*running, *queued], timeout=0.3).done
    finally:
        any_engine.resume()
    assert later == ended
    assert all(request.result(120).token_ids for request in [*running, *queued])


def test_room_is_taken_by_requests_and_given_back(any_engine: InferenceEngine, weights: Weights):
    push(any_engine, weights, 0)
    before = any_engine.room
    any_engine.pause()
    try:
        running = start(any_engine, make_prompts(8), max_new_tokens=20)
        if before is not None:
            wait_until(lambda: any_engine.room == before - 8)
    finally:
        any_engine.resume()
    assert all(request.result(120).token_ids for request in running)
    assert any_engine.room == before


# --- Behind a workflow ----------------------------------------------------------------------------


class Recorder:
    """An engine that remembers what was asked and what came back."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self.exchanges: list[tuple[ModelRequest, ModelResponse]] = []

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        response = await self._engine.agenerate(request)
        self.exchanges.append((request, response))
        return response


@pytest.mark.parametrize("agent_class", [CalculatorAgent, TalkativeAgent])
def test_an_agents_trajectories_are_token_for_token_what_the_engine_saw(
    any_engine: InferenceEngine, weights: Weights, tiny_model: str, agent_class: type[ChatWorkflow]
):
    push(any_engine, weights, 7)
    recorder = Recorder(any_engine)
    sampling = SamplingParams(max_new_tokens=24)
    agent = agent_class(load_tokenizer(tiny_model), gsm8k_reward, sampling, group_size=1)
    row = {"question": "What is half of 48?", "answer": "#### 24"}
    for _ in range(3):
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


# --- What only a model can show -------------------------------------------------------------------


def test_engine_and_trainer_agree_after_each_push(model_engine: InferenceEngine, tiny_model: str):
    assert_agrees_after_each_of_three_pushes(model_engine, tiny_model)


def test_each_token_was_sampled_with_the_weights_it_names(
    model_engine: InferenceEngine, weights: Weights, tiny_model: str
):
    pushed = {version: perturbed(weights, seed=10 + version) for version in range(4)}
    prompts = make_prompts(16, seed=1)
    responses = generate_through_pushes(model_engine, prompts, pushed)
    assert gap(Reference(tiny_model), pushed, prompts, responses, 1.0) <= LIMIT


def test_a_prompt_served_before_an_update_is_served_with_the_new_weights_after_it(
    model_engine: InferenceEngine, weights: Weights, tiny_model: str
):
    reference, prompts = Reference(tiny_model), make_prompts(8, length=64, seed=2)
    for version in (0, 1):
        pushed = perturbed(weights, seed=20 + version)
        push(model_engine, pushed, version)
        responses = generate(model_engine, prompts, SamplingParams(max_new_tokens=16))
        assert gap(reference, {version: pushed}, prompts, responses, 1.0) <= LIMIT
