"""Tools of an agent: Python functions to schemas, what a model wrote to calls, calls to results.

    def --type hints, docstring--> schema --chat template--> prompt
    response --parse_answer--> message with tool_calls --Tools.answer--> messages of role `tool`

Two formats are read, beside the one that a tokenizer brings itself (its `response_template`):

    hermes   <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>    Qwen, Hermes
    json     {"name": "add", "parameters": {"a": 1}}, or a list of these      Llama 3, Mistral
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

from arealite import background
from arealite.errors import ConfigError
from arealite.rollout.chat_template import Message

CallFormat = Literal["auto", "hermes", "json"]
"""How a model writes a call. auto: as its tokenizer or its chat template says."""

Schema = dict[str, Any]
"""A function as OpenAI's API describes it to a model."""

# As transformers' parser takes it. What is not JSON comes out as the text that it is.
_CALL = {
    "content": "json",
    "content_args": {"allow_non_json": True},
    "repeats": True,
    "transform": {"function": "{content}"},
}
_THOUGHTS = {"open": "<think>", "close": "</think>", "optional": True}
_CONTENT = {"repeats": True, "join": "", "content_args": {"strip": False}}
_HERMES = {
    "start_anchor": "<never>",
    "fields": {
        "reasoning_content": _THOUGHTS,
        "tool_calls": {"open": "<tool_call>", "close": "</tool_call>", **_CALL},
        "content": _CONTENT,
    },
}
_TEXT = {"start_anchor": "<never>", "fields": {"reasoning_content": _THOUGHTS, "content": _CONTENT}}


class Tools:
    """Functions that a model may call.

    Args:
        functions: `def` or `async def`, with type hints and a docstring of Google's style, whose
            `Args:` describe each parameter. A `def` runs in a thread, which nothing can stop:
            what a model has written belongs into a sandbox, see `arealite.rewards.code`.
        timeout_s: limit of one call in seconds; beyond it the model is told so. A function with
            an attribute `timeout_s` goes by that one; None: none, as for what waits in a queue.
        max_chars: of a result; what is longer is cut, and the model is told so.

    Raises:
        ConfigError: two functions of one name, or a function without the hints or the docstring
            that make its schema.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        *,
        timeout_s: float = 30.0,
        max_chars: int = 10_000,
    ) -> None:
        self.schemas: list[Schema] = [_schema(function) for function in functions]
        self._functions = {function.__name__: function for function in functions}
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        if len(self._functions) < len(functions):
            names = ", ".join(function.__name__ for function in functions)
            raise ConfigError(f"Each tool needs a name of its own; there are {names}.")

    async def answer(self, message: Message) -> list[Message]:
        """Results of all calls in a message, made at the same time, as messages of role `tool`."""
        calls = message.get("tool_calls") or []
        results = await asyncio.gather(*(self._result(call["function"]) for call in calls))
        return [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "name": call["function"]["name"],
                "content": result,
            }
            for call, result in zip(calls, results, strict=True)
        ]

    async def _result(self, call: dict[str, Any]) -> str:
        """What the function returned, or what the model is told instead."""
        function = self._functions.get(call["name"])
        if function is None:
            known = ", ".join(self._functions)
            return f"Error: there is no tool {call['name']!r}. There are: {known}."
        try:
            arguments = inspect.signature(function).bind(**json.loads(call["arguments"]))
        except (TypeError, ValueError) as error:
            return f"Error: {call['name']}: {error}."
        timeout_s = getattr(function, "timeout_s", self._timeout_s)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                value = await _call(function, arguments)
            text = value if isinstance(value, str) else json.dumps(value, default=str)
        except (Exception, SystemExit) as error:  # what a tool makes of arguments is for the model
            if isinstance(error, TimeoutError) and limit.expired():
                return f"Error: {call['name']} took longer than {timeout_s:g} s."
            text = f"Error: {type(error).__name__}: {error}"
        text = text.encode(errors="replace").decode()  # half of a surrogate pair has no tokens
        if len(text) <= self._max_chars:
            return text
        kept = text[: self._max_chars]
        return f"{kept}\n[cut: the first {len(kept)} of {len(text)} characters]"


def check_call_format(call_format: CallFormat) -> None:
    """Raise ConfigError for a format that nobody reads."""
    if call_format not in get_args(CallFormat):
        known = ", ".join(get_args(CallFormat))
        raise ConfigError(f"call_format={call_format!r} must be one of {known}.")


def parse_answer(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    schemas: Sequence[Schema] = (),
    call_format: CallFormat = "auto",
    prompt: str = "",
    num_calls: int = 0,
) -> Message:
    """A response as a message of OpenAI's API: its text, thoughts, and calls of tools.

    A call that cannot be read leaves the text as it is: then nothing is called.

    Args:
        schemas: of the tools; without any there are no calls.
        prompt: text before the response, in whose last words its thoughts may have begun.
        num_calls: of the conversation so far; ids go on from there.
    """
    prefix = "<think>" if prompt.rstrip().endswith("<think>") else ""
    plain = parse_response(text, _TEXT, prefix=prefix) if "think>" in prefix + text else {}
    thoughts = plain.get("reasoning_content")
    said = (plain.get("content") or "").strip() if thoughts else text
    message: Message = {"role": "assistant", "content": said}
    message |= {"reasoning_content": thoughts} if thoughts else {}
    if not schemas:
        return message
    template = _response_template(tokenizer, call_format)
    content, calls = (
        _json_calls(said, schemas) if template is None else _calls(text, template, prefix, schemas)
    )
    read = [_openai_call(call, num_calls + index) for index, call in enumerate(calls)]
    if not read or None in read:
        return message
    return message | {"content": content, "tool_calls": read}


def _calls(
    text: str, template: dict[str, Any], prefix: str, schemas: Sequence[Schema]
) -> tuple[str, list[dict[str, Any]]]:
    """The text beside the calls, and the calls."""
    try:
        found = parse_response(text, template, prefix=prefix, tools=list(schemas))
    except (ValueError, KeyError, TypeError, RecursionError):  # in no format of the template
        return text, []
    return (found.get("content") or "").strip(), found.get("tool_calls") or []


def _response_template(
    tokenizer: PreTrainedTokenizerBase, call_format: CallFormat
) -> dict[str, Any] | None:
    """How to find calls in a response; None: it is JSON as a whole."""
    if call_format == "auto" and (own := getattr(tokenizer, "response_template", None)):
        return own
    is_hermes = call_format == "hermes" or (
        call_format == "auto" and "<tool_call>" in str(tokenizer.chat_template)
    )
    return _HERMES if is_hermes else None


def _json_calls(text: str, schemas: Sequence[Schema]) -> tuple[str, list[dict[str, Any]]]:
    """Calls that are all of a text: an object, a list, or objects with semicolons between.

    An answer may be JSON as well, also with a `name`: a call has arguments, or a tool of that name.
    """
    names = [schema["function"]["name"] for schema in schemas]
    text = text.strip().removeprefix("<|python_tag|>")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = [json.loads(part) for part in text.split(";")]
        except (ValueError, RecursionError):
            return text, []
    calls = value if isinstance(value, list) else [value]
    if not all(
        isinstance(call, dict)
        and ({"arguments", "parameters"} & call.keys() or call.get("name") in names)
        for call in calls
    ):
        return text, []
    return "", [{"function": call} for call in calls]


def _openai_call(call: dict[str, Any], number: int) -> dict[str, Any] | None:
    """The call with its arguments as JSON text, as OpenAI has them; None if it is not one."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    arguments = json.dumps(arguments, ensure_ascii=False)
    try:
        (function["name"] + arguments).encode()
    except UnicodeEncodeError:  # an escape of half a surrogate pair, which is no text
        return None
    return {
        "id": f"call{number:05d}",  # Mistral's template insists on nine characters
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": arguments,
        },
    }


def _schema(function: Callable[..., Any]) -> Schema:
    try:
        return get_json_schema(function)
    except (
        DocstringParsingException,
        TypeHintParsingException,
        TypeError,
        AttributeError,
    ) as error:
        name = getattr(function, "__name__", repr(function))
        raise ConfigError(
            f"The tool {name} cannot be described to a model: {error} Give each parameter a type "
            "hint and a line in the docstring, below `Args:`."
        ) from error


async def _call(function: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(*arguments.args, **arguments.kwargs)
    return await background.in_thread(function, *arguments.args, **arguments.kwargs)
