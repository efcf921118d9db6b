"""Answers as clients of OpenAI's API read them, whole and streamed."""

from typing import Any

import openai
import pytest

from arealite.testing import ScriptedEngine
from arealite.types import SamplingParams
from tests.agents.conftest import Serve

CALL = '<tool_call>{"name": "add", "arguments": {"a": %d}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TWO_CALLS = "Both: " + CALL % 1 + CALL % 2


def calls_of(message: Any) -> list[tuple[str, str, str]]:
    return [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or []]


def test_an_answer_says_what_it_took_and_which_weights_it_came_from(serve: Serve):
    engine = ScriptedEngine(["Hello"])
    engine.version = 3
    reply = serve(engine).ask("Hi")
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", "any")
    assert reply.system_fingerprint == "weights-3"
    # <|im_start|>user NEWLINE Hi<|im_end|> NEWLINE <|im_start|>assistant NEWLINE; Hello<|im_end|>
    assert reply.usage.prompt_tokens == (1 + 5 + 2 + 1 + 1) + (1 + 10)
    assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (6, 27)
    [choice] = reply.choices
    assert (choice.finish_reason, choice.message.role, choice.message.content) == (
        "stop",
        "assistant",
        "Hello",
    )
    assert choice.message.tool_calls is None and choice.logprobs is None


def test_calls_of_tools_come_in_parallel_beside_the_text(serve: Serve):
    [choice] = serve([TWO_CALLS], call_format="hermes").ask("1, 2?", tools=[TOOL]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Both:"
    assert calls_of(choice.message) == [
        ("call00000", "add", '{"a": 1}'),
        ("call00001", "add", '{"a": 2}'),
    ]


def test_an_answer_of_calls_alone_has_no_text(serve: Serve):
    [choice] = serve([CALL % 1], call_format="hermes").ask("1?", tools=[TOOL]).choices
    assert choice.message.content is None


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"parallel_tool_calls": False}, 1), ({"tool_choice": "none"}, 0), ({}, 2)],
)
def test_a_client_may_want_one_call_or_none(serve: Serve, settings: dict[str, Any], count: int):
    each = serve([TWO_CALLS], call_format="hermes")
    [choice] = each.ask("1, 2?", tools=[TOOL], **settings).choices
    assert len(choice.message.tool_calls or []) == count
    assert (choice.message.content == TWO_CALLS) == (count == 0)
    assert each.sampled() == [TWO_CALLS + "<|im_end|>"]


def test_a_call_without_tools_is_text(serve: Serve):
    [choice] = serve([CALL % 1], call_format="hermes").ask("1?").choices
    assert (choice.message.content, choice.finish_reason) == (CALL % 1, "stop")


def test_logprobs_are_those_that_are_trained_on(serve: Serve):
    [choice] = serve(["ab"]).ask("Hi", logprobs=True).choices
    entries = [(e.token, e.logprob, e.bytes, e.top_logprobs) for e in choice.logprobs.content]
    assert entries == [
        ("a", -0.5, [97], []),
        ("b", -0.5, [98], []),
        ("<|im_end|>", -0.5, list(b"<|im_end|>"), []),
    ]


@pytest.mark.parametrize(
    ("settings", "run", "text", "reason"),
    [
        ({"max_tokens": 3}, 200, "abc", "length"),
        ({"max_completion_tokens": 2}, 200, "ab", "length"),
        ({"max_tokens": 100}, 4, "abcd", "length"),
        ({"stop": "c"}, 200, "ab", "stop"),
        ({"stop": ["x", "de"]}, 200, "abc", "stop"),
        ({"max_tokens": 8}, 200, "abcdefg", "stop"),
    ],
)
def test_an_answer_ends_where_the_run_or_the_client_says(
    serve: Serve, settings: dict[str, Any], run: int, text: str, reason: str
):
    each = serve(["abcdefg"], sampling=SamplingParams(max_new_tokens=run))
    [choice] = each.ask("Hi", **settings).choices
    assert (choice.message.content, choice.finish_reason) == (text, reason)


def test_thoughts_come_beside_the_answer(serve: Serve):
    [choice] = serve(["<think>2 and 2</think>4"]).ask("Hi").choices
    assert (choice.message.reasoning_content, choice.message.content) == ("2 and 2", "4")


def test_headers_can_be_read_beside_the_reply(serve: Serve):
    each = serve(["Hello"])
    raw = each.client.chat.completions.with_raw_response.create(
        model="m", messages=[{"role": "user", "content": "Hi"}]
    )
    assert raw.headers["content-type"].startswith("application/json")
    assert raw.parse().choices[0].message.content == "Hello"


# --- Streams --------------------------------------------------------------------------------------


def test_a_stream_has_the_answer_word_by_word(serve: Serve):
    chunks = list(serve(["One two  three."]).ask("Hi", stream=True))
    deltas = [chunk.choices[0].delta.content for chunk in chunks]
    assert deltas == ["", "One ", "two  ", "three.", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_what_it_took_if_asked_to(serve: Serve):
    reply = serve(["Hello"]).ask("Hi", stream=True, stream_options={"include_usage": True})
    *_, last = reply
    assert (last.choices, last.usage.completion_tokens) == ([], 6)


def test_a_stream_of_several_answers_keeps_them_apart(serve: Serve):
    texts = {0: "", 1: ""}
    for chunk in serve(["Hello you"]).ask("Hi", stream=True, n=2):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "Hello you", 1: "Hello you"}


def test_the_helper_for_streams_puts_an_answer_together(serve: Serve):
    each = serve([TWO_CALLS], call_format="hermes")
    with each.client.chat.completions.stream(
        model="m",
        messages=[{"role": "user", "content": "Hi"}],
        tools=[TOOL],  # type: ignore[list-item]
        logprobs=True,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = {event.type for event in stream}
        reply = stream.get_final_completion()
    assert {"content.delta", "content.done", "tool_calls.function.arguments.done"} <= kinds
    [choice] = reply.choices
    assert (choice.message.content, choice.finish_reason) == ("Both:", "tool_calls")
    assert calls_of(choice.message)[1] == ("call00001", "add", '{"a": 2}')
    assert choice.logprobs and len(choice.logprobs.content or []) == len(TWO_CALLS) + 1
    assert reply.usage and reply.usage.completion_tokens == len(TWO_CALLS) + 1


def test_a_refusal_of_a_stream_is_an_error_and_no_stream(serve: Serve):
    with pytest.raises(openai.BadRequestError, match="n must be a whole number"):
        serve(["x"]).ask("Hi", stream=True, n=0)
