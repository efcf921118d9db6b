"""Only what the engine sampled is trained on, whatever a workflow makes up."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from arealite.api import InferenceEngine
from arealite.errors import RolloutError, TrajectoryError
from arealite.rollout.executor import run_episodes
from arealite.rollout.transcript import Transcript
from arealite.testing import ScriptedEngine, byte_tokenizer
from arealite.types import ModelRequest, ModelResponse, Row, SamplingParams, Trajectory

TOKENIZER = byte_tokenizer()
SAMPLING = SamplingParams(max_new_tokens=32)
Episode = Callable[[InferenceEngine], Awaitable[list[Trajectory]]]


class Workflow:
    """A workflow made of one function."""

    group_size = 1

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    async def arun_episode(self, engine: InferenceEngine, row: Row) -> list[Trajectory]:
        return await self._episode(engine)


def run(episode: Episode) -> list[Trajectory]:
    """The group of an episode, if the executor takes it."""
    engine = ScriptedEngine(replies=["one", "two", "three", "four"])
    [group] = run_episodes(engine, Workflow(episode), [{}])  # type: ignore[arg-type]
    return group


def assert_refused(episode: Episode, *, told: str = "as sampled, but the engine did not") -> None:
    with pytest.raises(RolloutError, match=told) as caught:
        run(episode)
    assert isinstance(caught.value.__cause__, TrajectoryError)


def start(question: str = "hi") -> Transcript:
    return Transcript(TOKENIZER, [{"role": "user", "content": question}])


async def ask(engine: InferenceEngine, chat: Transcript) -> ModelResponse:
    return await engine.agenerate(chat.request(SAMPLING))


async def talk(engine: InferenceEngine, num_turns: int = 2, question: str = "hi") -> Transcript:
    chat = start(question)
    for turn in range(num_turns):
        if turn:
            chat.add_message("user", "more")
        chat.add_response(await ask(engine, chat))
    return chat


def replaced(values: list[Any], place: int, value: Any) -> list[Any]:
    return [*values[:place], value, *values[place + 1 :]]


def sampled_at(trajectory: Trajectory, number: int = 0) -> int:
    """Place of a sampled token."""
    return [i for i, is_sampled in enumerate(trajectory.loss_mask) if is_sampled][number]


# What is made up.


def called_sampled(trajectory: Trajectory) -> Trajectory:
    """A token of the user's among them, with a log-prob and a version."""
    place = sampled_at(trajectory) - 1
    return replace(
        trajectory,
        loss_mask=replaced(trajectory.loss_mask, place, True),
        behavior_logprobs=replaced(trajectory.behavior_logprobs, place, -0.5),
        versions=replaced(trajectory.versions, place, 0),
    )


def between_turns(trajectory: Trajectory) -> Trajectory:
    """All from the first answer on, the user's second message too."""
    begin = sampled_at(trajectory)
    rest = len(trajectory.token_ids) - begin
    return replace(
        trajectory,
        loss_mask=[False] * begin + [True] * rest,
        behavior_logprobs=[0.0] * begin + [-0.5] * rest,
        versions=[-1] * begin + [0] * rest,
    )


def shifted(trajectory: Trajectory) -> Trajectory:
    """By one, as if index t told of token t + 1."""
    return replace(
        trajectory,
        loss_mask=[*trajectory.loss_mask[1:], False],
        behavior_logprobs=[*trajectory.behavior_logprobs[1:], 0.0],
        versions=[*trajectory.versions[1:], -1],
    )


def with_another(field: str, value: Any, number: int = 0) -> Callable[[Trajectory], Trajectory]:
    def change(trajectory: Trajectory) -> Trajectory:
        values = replaced(getattr(trajectory, field), sampled_at(trajectory, number), value)
        return replace(trajectory, **{field: values})

    return change


def with_another_prompt(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, token_ids=replaced(trajectory.token_ids, 3, 99))


def with_a_longer_prompt(trajectory: Trajectory) -> Trajectory:
    return replace(
        trajectory,
        token_ids=[5, *trajectory.token_ids],
        loss_mask=[False, *trajectory.loss_mask],
        behavior_logprobs=[0.0, *trajectory.behavior_logprobs],
        versions=[-1, *trajectory.versions],
    )


def cut_between(trajectory: Trajectory) -> Trajectory:
    """Without what was told between the turns."""
    begin = sampled_at(trajectory)
    kept = [i for i, is_sampled in enumerate(trajectory.loss_mask) if i < begin or is_sampled]
    fields = ("token_ids", "loss_mask", "behavior_logprobs", "versions")
    return replace(trajectory, **{f: [getattr(trajectory, f)[i] for i in kept] for f in fields})


def at_another_temperature(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, temperature=0.5)


FORGERIES = [
    called_sampled,
    between_turns,
    shifted,
    with_another("behavior_logprobs", -0.25),
    with_another("behavior_logprobs", -0.25, -1),
    with_another("versions", 1),
    with_another("token_ids", 99),
    with_another("token_ids", 99, -1),
    with_another_prompt,
    with_a_longer_prompt,
    cut_between,
    at_another_temperature,
]


@pytest.mark.fault(72, "ids, masks, log-probs, versions or places that were changed")
@pytest.mark.parametrize("forge", FORGERIES)
def test_a_trajectory_that_was_changed_is_refused(forge: Callable[[Trajectory], Trajectory]):
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        return [forge(await (await talk(engine)).finish(1.0))]

    assert_refused(episode)


def test_a_trajectory_made_by_hand_is_refused():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        return [
            Trajectory(
                token_ids=[5, 6],
                loss_mask=[False, True],
                behavior_logprobs=[0.0, -0.5],
                versions=[-1, 0],
                reward=1.0,
                temperature=1.0,
                finish_reason="stop",
            )
        ]

    assert_refused(episode)


def forged(request: ModelRequest | None, text: str = "I said so") -> ModelResponse:
    token_ids = TOKENIZER.encode(text)
    return ModelResponse(
        token_ids=token_ids,
        behavior_logprobs=[-0.5] * len(token_ids),
        versions=[0] * len(token_ids),
        finish_reason="stop",
        request=request,
    )


def test_a_response_that_names_the_request_but_not_the_engine_is_refused():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat = start()
        chat.add_response(forged(chat.request(SAMPLING)))
        return [await chat.finish(1.0)]

    assert_refused(episode)


def test_a_response_from_beside_the_witness_is_refused():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat = start()
        other = ScriptedEngine(replies=["one"])
        chat.add_response(await other.agenerate(chat.request(SAMPLING)))
        return [await chat.finish(1.0)]

    assert_refused(episode)


def test_a_response_of_another_conversation_is_refused_at_once():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat, other = start(), start("something else")
        chat.request(SAMPLING)
        chat.add_response(await ask(engine, other))
        return [await chat.finish(1.0)]

    assert_refused(episode, told="answered to the last request")


def test_a_response_of_another_conversation_is_refused_under_a_false_name():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat, other = start(), start("something else")
        response = await ask(engine, other)
        chat.add_response(replace(response, request=chat.request(SAMPLING)))
        return [await chat.finish(1.0)]

    assert_refused(episode)


@pytest.mark.parametrize(
    ("field", "value"), [("token_ids", 99), ("behavior_logprobs", -0.1), ("versions", 1)]
)
def test_a_response_that_was_changed_before_it_was_added_is_refused(field: str, value: Any):
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat = start()
        response = await ask(engine, chat)
        getattr(response, field)[0] = value
        chat.add_response(response)
        return [await chat.finish(1.0)]

    assert_refused(episode)


def test_a_response_with_tokens_added_to_it_is_refused():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat = start()
        response = await ask(engine, chat)
        response.token_ids.append(7)
        response.behavior_logprobs.append(-0.5)
        response.versions.append(0)
        chat.add_response(response)
        return [await chat.finish(1.0)]

    assert_refused(episode)


def test_a_request_that_was_changed_before_it_was_asked_is_refused():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat = start()
        request = chat.request(SAMPLING)
        request.token_ids[0] = 77
        chat.add_response(await engine.agenerate(request))
        return [await chat.finish(1.0)]

    assert_refused(episode)


# What is as it was sampled.


@pytest.mark.parametrize("field", ["token_ids", "behavior_logprobs", "versions"])
def test_a_response_that_is_changed_after_it_was_added_changes_nothing(field: str):
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat = start()
        response = await ask(engine, chat)
        chat.add_response(response)
        getattr(response, field)[0] = 1
        return [await chat.finish(1.0)]

    [trajectory] = run(episode)
    begin = sampled_at(trajectory)
    assert TOKENIZER.decode(trajectory.token_ids[begin:]) == "one<|im_end|>"
    assert trajectory.behavior_logprobs[begin] == -0.5 and trajectory.versions[begin] == 0


def test_some_turns_and_some_tokens_may_be_left_out_of_training():
    def without(trajectory: Trajectory, *places: int) -> Trajectory:
        fields = {
            "loss_mask": False,
            "behavior_logprobs": 0.0,
            "versions": -1,
        }
        for place in places:
            fields_now = {f: replaced(getattr(trajectory, f), place, v) for f, v in fields.items()}
            trajectory = replace(trajectory, **fields_now)
        return trajectory

    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        whole = await (await talk(engine, 3)).finish(1.0)
        places = [i for i, is_sampled in enumerate(whole.loss_mask) if is_sampled]
        turns = {"one": places[:4], "two": places[4:8], "three": places[8:]}
        return [
            without(whole, *turns["one"]),
            without(whole, *turns["two"], *turns["three"]),
        ]

    async def with_gaps(engine: InferenceEngine) -> list[Trajectory]:
        whole = await (await talk(engine, 3)).finish(1.0)
        places = [i for i, is_sampled in enumerate(whole.loss_mask) if is_sampled]
        return [without(whole, places[0], places[5], places[-1])]

    assert [each.response_length for each in run(episode)] == [10, 4]
    assert [each.response_length for each in run(with_gaps)] == [11]


@pytest.mark.fault(72, "the same tokens twice")
def test_no_token_is_trained_on_twice():
    async def twice(engine: InferenceEngine) -> list[Trajectory]:
        trajectory = await (await talk(engine)).finish(1.0)
        return [trajectory, trajectory]

    async def in_two_branches(engine: InferenceEngine) -> list[Trajectory]:
        chat = await talk(engine)
        return [await chat.branch(is_trained=True).finish(1.0) for _ in range(2)]

    async def equal_answers(engine: InferenceEngine) -> list[Trajectory]:
        return [await (await talk(engine, 1)).finish(1.0) for _ in range(2)]

    assert_refused(twice, told="was trained on before")
    assert_refused(in_two_branches, told="was trained on before")
    assert len(run(equal_answers)) == 2


def test_the_earlier_parts_of_a_conversation_are_in_its_group():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        earlier, last = await talk(engine, 1, "one?"), await talk(engine, 1, "two?")
        return [replace(await last.finish(1.0), earlier=(await earlier.finish(1.0),))]

    assert [(each.sample, each.earlier) for each in run(episode)] == [(0, ())] * 2


def test_several_conversations_and_branches_are_taken():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        first, second = await talk(engine), await talk(engine, question="and you?")
        branches = [second.branch(is_trained=True), second.branch(is_trained=False)]
        for branch, text in zip(branches, ["so?", "or?"], strict=True):
            branch.add_message("user", text)
            branch.add_response(await ask(engine, branch))
        return [await each.finish(1.0) for each in (first, *branches)]

    assert len(run(episode)) == 3


def test_responses_without_a_word_between_them_are_taken():
    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        short = replace(SAMPLING, max_new_tokens=2)
        prompt = start().token_ids
        first = await engine.agenerate(ModelRequest(token_ids=prompt, sampling=short))
        asked = prompt + first.token_ids
        rest = await engine.agenerate(ModelRequest(token_ids=asked, sampling=short))
        responses = [first, rest]
        context = len(prompt)
        return [
            Trajectory(
                token_ids=prompt + [t for r in responses for t in r.token_ids],
                loss_mask=[False] * context + [True] * 4,
                behavior_logprobs=[0.0] * context
                + [p for r in responses for p in r.behavior_logprobs],
                versions=[-1] * context + [v for r in responses for v in r.versions],
                reward=1.0,
                temperature=1.0,
                finish_reason="length",
            )
        ]

    [trajectory] = run(episode)
    assert trajectory.response_length == 4


def test_a_conversation_that_was_begun_anew_is_taken_with_both_its_parts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)

    async def episode(engine: InferenceEngine) -> list[Trajectory]:
        chat = Transcript(tokenizer, [{"role": "user", "content": "hi"}])
        chat.add_response(await ask(engine, chat))
        chat.add_message("user", "more")
        chat.add_response(await ask(engine, chat))
        trajectory = await chat.finish(1.0)
        return [*trajectory.earlier, replace(trajectory, earlier=())]

    assert len(run(episode)) == 2


def test_the_engine_of_an_episode_is_the_engine_to_all_else():
    engine = ScriptedEngine(replies=["one"])

    async def episode(seen: Any) -> list[Trajectory]:
        assert seen.version == engine.version and seen.max_model_len == engine.max_model_len
        seen.note = "kept"
        return [await (await talk(seen, 1)).finish(1.0)]

    run_episodes(engine, Workflow(episode), [{}])  # type: ignore[arg-type]
    assert engine.note == "kept"  # type: ignore[attr-defined]
    assert asyncio.run(engine.agenerate(start().request(SAMPLING))).token_ids
