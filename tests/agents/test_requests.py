"""What a body may ask for, and how what it may not is refused."""

import json
from typing import Any

import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.agents.requests import ChatCall, RequestError, plain_message, read_call
from tests.agents.conftest import Serve

QUESTION = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def read(**fields: Any) -> ChatCall:
    return read_call(json.dumps({"messages": [QUESTION], **fields}).encode())


def test_a_call_with_nothing_but_messages_takes_what_the_run_says():
    assert read() == ChatCall(model="policy", messages=[QUESTION])


def test_null_is_the_same_as_nothing():
    names = ("n", "stop", "tools", "max_tokens", "logprobs", "response_format", "temperature")
    assert read(**dict.fromkeys(names)) == read()


def test_reads_all_that_the_policy_can_follow():
    call = read(
        model="m",
        tools=[TOOL],
        tool_choice="none",
        parallel_tool_calls=False,
        n=3,
        stop=["a", "b"],
        max_completion_tokens=7,
        max_tokens=9,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        chat_template_kwargs={"enable_thinking": True, "x": 1},
        reasoning_effort="none",
    )
    assert call == ChatCall(
        model="m",
        messages=[QUESTION],
        tools=[TOOL],
        may_call_tools=False,
        num_choices=3,
        max_new_tokens=7,
        stop=("a", "b"),
        has_logprobs=True,
        is_streamed=True,
        has_usage_chunk=True,
        has_one_tool_call=True,
        template_kwargs={"reasoning_effort": "none", "enable_thinking": True, "x": 1},
    )


def test_tells_what_changes_nothing_but_not_what_is_for_others():
    call = read(temperature=0.1, seed=1, unheard_of=2, user="me", store=True, metadata={"a": "b"})
    assert set(call.without_effect) == {"temperature", "seed", "unheard_of"}


@pytest.mark.parametrize(
    ("message", "is_read_as"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            {"role": "user", "content": "ab"},
        ),
        (
            {
                "role": "assistant",
                "content": "x",
                "refusal": None,
                "annotations": [],
                "audio": None,
            },
            {"role": "assistant", "content": "x"},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning": "hm"},
            {"role": "assistant", "content": "x", "reasoning_content": "hm"},
        ),
        (
            {"role": "tool", "content": "3", "tool_call_id": "c", "name": "add"},
            {"role": "tool", "content": "3", "tool_call_id": "c", "name": "add"},
        ),
    ],
)
def test_messages_are_read_without_what_only_decorates_them(message: Any, is_read_as: Any):
    assert plain_message(message) == is_read_as


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [QUESTION, "Hi"]}, "messages[1]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"model": 3}, "model"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": "add"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": []}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_names_the_field_that_is_to_blame(fields: dict[str, Any], param: str):
    with pytest.raises(RequestError) as refused:
        read(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize("name", ["response_format", "tool_choice", "modalities", "top_logprobs"])
def test_what_asks_for_nothing_special_is_no_reason_to_refuse(name: str):
    harmless = {
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "modalities": ["text"],
        "top_logprobs": 0,
    }
    assert read(**{name: harmless[name]}) == read()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(body: bytes):
    with pytest.raises(RequestError, match="The body"):
        read_call(body)


TEXT = st.sampled_from(["", "a", "user", "assistant", "tool", "auto", "text", "function"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from(("messages", "tools", "tool_choice", "n", "stop", "stream_options"))
PARTS = st.sampled_from(("role", "content", "tool_calls", "name", "arguments", "text", "type"))
MESSAGES = st.lists(st.dictionaries(PARTS, JSON, max_size=3), max_size=3)


@given(st.dictionaries(FIELDS, JSON) | st.fixed_dictionaries({"messages": MESSAGES}))
def test_any_body_is_read_or_refused(body: dict[str, Any]):
    try:
        call = read_call(json.dumps(body).encode())
    except RequestError as error:
        assert str(error)
    else:
        assert all(isinstance(message["content"], str) for message in call.messages)


# --- As clients see it ----------------------------------------------------------------------------


def test_clients_get_the_errors_of_openai(serve: Serve):
    each = serve(["x"])
    with pytest.raises(openai.BadRequestError) as refused:
        each.ask("Hi", tools=[TOOL], tool_choice="required")
    assert (refused.value.param, refused.value.type) == ("tool_choice", "invalid_request_error")
    assert "an answer is what the policy samples" in refused.value.message


def test_a_schema_of_the_answer_is_refused_and_not_ignored(serve: Serve):
    class Answer(pydantic.BaseModel):
        value: int

    with pytest.raises(openai.BadRequestError, match="response_format is not supported here"):
        serve(["x"]).client.chat.completions.parse(
            model="m",
            messages=[QUESTION],  # type: ignore[list-item]
            response_format=Answer,
        )
