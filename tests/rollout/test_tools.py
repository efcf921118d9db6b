"""Functions as tools: their schemas, the calls in a response, and what comes back."""

import asyncio
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.errors import ConfigError
from arealite.rollout.tools import CallFormat, Tools, parse_answer
from arealite.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()


def multiply(a: int, b: int = 2) -> int:
    """Multiply two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


async def look_up(key: str) -> dict[str, str]:
    """Find what belongs to a key.

    Args:
        key: What to look for.
    """
    return {key: {"tea": "kettle"}[key]}


TOOLS = Tools([multiply, look_up])


def call_of(name: str, arguments: object) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": "call00000", "type": "function", "function": function}


def answers(*calls: dict[str, Any], tools: Tools = TOOLS) -> list[str]:
    message = {"role": "assistant", "content": "", "tool_calls": list(calls)}
    return [each["content"] for each in asyncio.run(tools.answer(message))]


def parsed(text: str, call_format: CallFormat, **settings: Any) -> dict[str, Any]:
    message = parse_answer(
        text, TOKENIZER, schemas=TOOLS.schemas, call_format=call_format, **settings
    )
    assert message.pop("role") == "assistant"
    return message


def test_type_hints_and_docstring_become_the_schema():
    assert TOOLS.schemas[0]["function"] == {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first."},
                "b": {"type": "integer", "description": "The second."},
            },
            "required": ["a"],
        },
    } | ({"return": TOOLS.schemas[0]["function"]["return"]})


def test_a_function_without_hints_or_docstring_is_refused_with_what_to_write():
    def bare(a, b):
        return a

    with pytest.raises(ConfigError, match=r"tool bare .*`Args:`"):
        Tools([bare])


def test_results_come_in_the_order_of_the_calls_under_their_ids():
    calls = [call_of("look_up", {"key": "tea"}), call_of("multiply", {"a": 3})]
    calls[1]["id"] = "call00001"
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    assert asyncio.run(TOOLS.answer(message)) == [
        {
            "role": "tool",
            "tool_call_id": "call00000",
            "name": "look_up",
            "content": '{"tea": "kettle"}',
        },
        {"role": "tool", "tool_call_id": "call00001", "name": "multiply", "content": "6"},
    ]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (call_of("divide", {"a": 1}), "no tool 'divide'. There are: multiply, look_up"),
        (call_of("multiply", {"b": 1}), "missing a required argument: 'a'"),
        (call_of("multiply", {"a": 1, "c": 1}), "unexpected keyword argument 'c'"),
        (call_of("multiply", [1, 2]), "Error: multiply"),
        (call_of("look_up", {"key": "coffee"}), "KeyError: 'coffee'"),
    ],
)
def test_a_call_that_fails_tells_the_model_why(call: dict[str, Any], told: str):
    [answer] = answers(call)
    assert answer.startswith("Error:") and told in answer


def stops() -> str:
    """Stop."""
    return next(iter([]))


def ends() -> str:
    """End Python."""
    raise SystemExit(3)


def returns_pairs() -> dict[str, str]:
    """Return what JSON does not know."""
    return {(1, 2): "x"}  # type: ignore[dict-item]


@pytest.mark.parametrize("tool", [stops, ends, returns_pairs])
def test_no_tool_ends_the_episode(tool: Callable[[], object]):
    [answer] = answers(call_of(tool.__name__, {}), tools=Tools([tool]))
    assert answer.startswith("Error: ")


def test_what_has_no_name_is_no_tool():
    with pytest.raises(ConfigError, match="cannot be described to a model"):
        Tools([functools.partial(multiply, b=3)])


def test_a_tool_that_takes_too_long_is_left_behind():
    async def wait() -> str:
        """Wait."""
        await asyncio.sleep(100)
        return ""

    assert answers(call_of("wait", {}), tools=Tools([wait], timeout_s=0.01)) == [
        "Error: wait took longer than 0.01 s."
    ]


def test_a_result_that_is_no_text_can_still_be_told():
    def read(path: str) -> str:
        """Read a file.

        Args:
            path: Its name.
        """
        return f"{path}: \udcff"

    assert answers(call_of("read", {"path": "a"}), tools=Tools([read])) == ["a: ?"]


CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": "12", "b": 3}}\n</tool_call>'


def test_hermes_calls_are_read_with_arguments_of_their_types():
    message = parsed(f"Let me see. {CALL}\n{CALL}", "hermes", num_calls=3)
    assert message["content"] == "Let me see."
    assert [call["id"] for call in message["tool_calls"]] == ["call00003", "call00004"]
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [
        {"a": 12, "b": 3}
    ] * 2


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "multiply", "parameters": {"a": 12, "b": 3}}',
        '[{"name": "multiply", "arguments": {"a": 12, "b": 3}}]',
        ' <|python_tag|>{"name": "multiply", "arguments": {"a": 12, "b": 3}} ',
    ],
)
def test_calls_that_are_the_whole_of_a_json_text_are_read(text: str):
    [call] = parsed(text, "json")["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 12, "b": 3}


def test_several_json_calls_are_read():
    one = '{"name": "multiply", "parameters": {"a": 1}}'
    assert len(parsed(f"{one}; {one}", "json")["tool_calls"]) == 2


@pytest.mark.parametrize("call_format", ["hermes", "json"])
@pytest.mark.parametrize(
    "text",
    ids=lambda text: text[:30],
    argvalues=[
        "no call at all",
        "<tool_call>{oops}</tool_call>",
        f'{CALL}<tool_call>{{"name": 5}}</tool_call>',
        '<tool_call>["multiply"]</tool_call>',
        '{"a": 12}',
        '{"name": "multiply", "parameters": 5}',
        '{"name": "multiply", "parameters": {"a": "\\ud83d"}}',
        '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
        "12",
        "[]",
        "null",
        "[" * 100_000,
        "<tool_call>" + "[" * 100_000,
    ],
)
def test_what_is_no_call_stays_text(call_format: CallFormat, text: str):
    if call_format == "json" and "<tool_call>" in text:
        assert "tool_calls" not in parsed(text, call_format)
        return
    assert parsed(text, call_format) == {"content": text}


def test_thoughts_are_kept_apart_even_if_the_prompt_began_them():
    assert parsed("<think>so</think>\n\nsix", "hermes") == {
        "content": "six",
        "reasoning_content": "so",
    }
    assert parsed("so</think>six", "hermes", prompt="<|im_start|>assistant\n<think>\n") == {
        "content": "six",
        "reasoning_content": "so",
    }


def test_without_tools_nothing_is_a_call():
    assert parse_answer(CALL, TOKENIZER, call_format="hermes")["content"] == CALL


def test_the_format_follows_the_chat_template():
    tokenizer = byte_tokenizer()
    assert "tool_calls" not in parse_answer(CALL, tokenizer, schemas=TOOLS.schemas)
    tokenizer.chat_template = "{# <tool_call> #}" + str(tokenizer.chat_template)
    assert "tool_calls" in parse_answer(CALL, tokenizer, schemas=TOOLS.schemas)


def test_a_tokenizer_may_bring_its_own_format():
    tokenizer = byte_tokenizer()
    tokenizer.response_template = {
        "start_anchor": "<never>",
        "fields": {
            "tool_calls": {
                "open": "CALL ",
                "close": "\n",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {},
        },
    }
    text = 'CALL {"name": "multiply", "arguments": {"a": 5}}\n'
    [call] = parse_answer(text, tokenizer, schemas=TOOLS.schemas)["tool_calls"]
    assert call["function"] == {"name": "multiply", "arguments": '{"a": 5}'}


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([*'{}[]",:; \n\x01', '"name"', "<tool_call>", "</tool_call>", "<think>"]),
        max_size=30,
    ).map("".join),
    st.sampled_from(["hermes", "json"]),
)
def test_no_text_is_an_error(text: str, call_format: CallFormat):
    message = parsed(text, call_format)
    assert isinstance(message["content"], str)
    assert all(call["function"]["name"] for call in message.get("tool_calls", []))


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"name of its own; there are multiply, multiply\.$"):
        Tools([multiply, multiply])


def speak(length: int) -> str:
    """Say much.

    Args:
        length: How much.
    """
    return "x" * length


def test_a_long_result_is_cut_and_says_so():
    short, long = answers(
        call_of("speak", {"length": 9}),
        call_of("speak", {"length": 10**6}),
        tools=Tools([speak], max_chars=9),
    )
    assert short == "x" * 9
    assert long == "x" * 9 + "\n[cut: the first 9 of 1000000 characters]"


async def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return "done"


def test_a_tool_may_have_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch):
    slow = call_of("wait", {"seconds": 0.05})
    tools = Tools([wait], timeout_s=0.01)
    assert answers(slow, tools=tools) == ["Error: wait took longer than 0.01 s."]
    monkeypatch.setattr(wait, "timeout_s", None, raising=False)
    assert answers(slow, tools=tools) == ["done"]


async def give_up() -> str:
    """Give up."""
    raise TimeoutError("the shop did not answer")


def test_the_deadline_of_a_tool_itself_is_told_as_what_it_is():
    told = answers(call_of("give_up", {}), tools=Tools([give_up]))
    assert told == ["Error: TimeoutError: the shop did not answer"]


@pytest.mark.parametrize(
    ("text", "is_call"),
    [
        ('{"name": "Ada", "age": 36}', False),
        ('{"name": "multiply"}', True),
        ('{"name": "divide", "arguments": {}}', True),  # and then told that there is none
        ('[{"name": "multiply"}, 3]', False),
        ('{"name": ["multiply"]}', False),
    ],
)
def test_an_answer_in_json_is_a_call_only_with_arguments_or_the_name_of_a_tool(
    text: str, is_call: bool
):
    message = parsed(text, "json")
    assert ("tool_calls" in message) == is_call
    assert is_call or message["content"] == text
