"""Random conversations on every template: what is trained on is what the engine saw and sampled."""

import asyncio
import os

import pytest

from arealite.rollout.chat_template import ChatTemplate, Message
from arealite.rollout.transcript import Transcript
from arealite.types import ModelResponse, SamplingParams
from tests.rollout.chat_templates import FACTS, NAMES, template_tokenizer
from tests.rollout.conversations import rendered, squeezed
from tests.rollout.random_talks import run_episode, run_transcript
from tests.rollout.test_chat_templates import (
    STAYS,
    TOOL,
    Answer,
    called,
    opening,
    result,
    spoken,
    user,
)

NUM_CONVERSATIONS = int(os.environ.get("AREALITE_CONVERSATIONS", "40"))
"""Of each kind and template."""
SEED = os.environ.get("AREALITE_SEED", "0")


@pytest.mark.parametrize("name", NAMES)
def test_a_transcript_trains_on_what_was_sampled_and_asks_what_the_template_writes(name: str):
    for number in range(NUM_CONVERSATIONS):
        run_transcript(name, f"{SEED} {number}")


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_trains_on_what_was_sampled_and_asks_what_the_template_writes(name: str):
    for number in range(NUM_CONVERSATIONS):
        asyncio.run(run_episode(name, f"{SEED} {number}"))


# What the docstring of the corpus says of each template.

SAMPLING = SamplingParams()
# By name: calls go on without and with thoughts, answers without and with thoughts.
GOES_ON = {name: tuple(bool(stays) for stays in of_name) for name, of_name in STAYS.items()}


def tools_of(name: str) -> list[Message] | None:
    return [TOOL] if FACTS[name].tool_calls else None


def talk(name: str, answer: Answer, told: Message, *, num_turns: int = 20) -> Transcript:
    """The same answer again and again, each followed by the same."""
    facts, tokenizer = FACTS[name], template_tokenizer(name)
    template = ChatTemplate(tokenizer, tools=tools_of(name), kwargs=dict(facts.keywords))
    chat = Transcript(template, [*opening(facts), user("1+2?")])
    end = facts.end_of_turn or ("<|observation|>" if told["role"] == "tool" else "<|user|>")
    ids = tokenizer.encode(answer.sampled + end, add_special_tokens=False)
    for _ in range(num_turns):
        response = ModelResponse(
            token_ids=ids,
            behavior_logprobs=[-1.0] * len(ids),
            versions=[0] * len(ids),
            finish_reason="stop",
            request=chat.request(SAMPLING),
        )
        chat.add_response(response, answer.message)
        chat.add_messages([told])
    return chat


@pytest.mark.parametrize("has_thoughts", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_answers_that_stay_are_never_begun_anew(name: str, has_thoughts: bool):
    chat = talk(name, spoken(name, has_thoughts=has_thoughts), user("Sure?"))
    assert len(chat.forks) == (0 if GOES_ON[name][2 + has_thoughts] else 20)
    if not chat.forks:
        text = template_tokenizer(name).decode(chat.token_ids)
        assert squeezed(text) == squeezed(rendered(name, chat.messages, tools_of(name)))


@pytest.mark.parametrize("has_thoughts", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if FACTS[name].tool_calls])
def test_calls_that_stay_are_never_begun_anew(name: str, has_thoughts: bool):
    chat = talk(name, called(name, has_thoughts=has_thoughts), result(1))
    assert bool(chat.forks) is not GOES_ON[name][has_thoughts]
