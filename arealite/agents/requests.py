"""A body of `/v1/chat/completions` as a `ChatCall`, or a refusal in words of OpenAI's API.

What decides how tokens are sampled (temperature, top_p, penalties, seed) belongs to the run: a
policy that is sampled otherwise than it is trained on learns something else. So these settings of
a client change nothing, as does what nobody here knows, and a warning says so once. What a client
relies on and does not get is refused: JSON by a schema, a call that must come, alternatives of each
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from arealite.rollout.chat_template import Message

MAX_CHOICES = 128
"""Of one call (`n`)."""
READ = (
    *("model", "messages", "tools", "tool_choice", "parallel_tool_calls", "n", "stop"),
    *("max_tokens", "max_completion_tokens", "logprobs", "stream", "stream_options"),
    *("chat_template_kwargs", "reasoning_effort"),
)
FOR_OTHERS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "request_id"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "session_id"),
)
"""What says nothing about the answer."""
NOT_HERE: dict[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "use_beam_search": (False,),
} | dict.fromkeys(
    (
        *("functions", "function_call", "audio", "web_search_options", "moderation"),
        *("structured_outputs", "chat_template", "documents", "prompt_logprobs"),
        *("allowed_token_ids", "bad_words", "truncate_prompt_tokens"),
    ),
    (),
)
"""What is refused, unless it has one of these values, which mean nothing special."""
ROLES = ("system", "developer", "user", "assistant", "tool")


class RequestError(Exception):
    """A call that is refused; becomes an error of OpenAI's API.

    Args:
        param: the field that is to blame.
    """

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCall:
    """What a client asks for."""

    model: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    may_call_tools: bool = True  # otherwise a call is text
    num_choices: int = 1
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    has_logprobs: bool = False
    is_streamed: bool = False
    has_usage_chunk: bool = False
    has_one_tool_call: bool = False  # at most; what is called beside it is not told
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()  # fields that change nothing


def read_call(content: bytes) -> ChatCall:
    """The call that a body asks for.

    Raises:
        RequestError: it is not JSON, or asks for what there is not.
    """
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise RequestError("The body must be an object.")
    fields = _Fields({name: value for name, value in body.items() if value is not None})
    _refuse_what_is_not_there(fields)
    options = fields.get("stream_options", dict, {})
    return ChatCall(
        model=fields.get("model", str, "policy"),
        messages=_messages(fields),
        tools=_tools(fields),
        may_call_tools=fields.get("tool_choice", str, "auto") == "auto",
        num_choices=fields.number("n", 1, MAX_CHOICES) or 1,
        max_new_tokens=fields.number("max_completion_tokens", 1) or fields.number("max_tokens", 1),
        stop=_stop(fields),
        has_logprobs=fields.get("logprobs", bool, False),
        is_streamed=fields.get("stream", bool, False),
        has_usage_chunk=bool(options.get("include_usage")),
        has_one_tool_call=not fields.get("parallel_tool_calls", bool, True),
        template_kwargs=_template_kwargs(fields),
        without_effect=tuple(fields.keys() - {*READ, *FOR_OTHERS, *NOT_HERE}),
    )


def plain_message(message: Message) -> Message:
    """A message without what only decorates it, so that it can be recognized when it comes back."""
    calls = [
        {
            "id": call.get("id", ""),
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": call["function"].get("arguments") or "{}",
            },
        }
        for call in message.get("tool_calls") or []
    ]
    thoughts = message.get("reasoning_content") or message.get("reasoning")  # vLLM's name for it
    kept = {name: message[name] for name in ("name", "tool_call_id") if message.get(name)}
    kept |= {"reasoning_content": thoughts} if thoughts else {}
    role = "system" if message["role"] == "developer" else message["role"]
    return (
        {"role": role, "content": _text(message.get("content"))}
        | kept
        | ({"tool_calls": calls} if calls else {})
    )


class _Fields(dict[str, Any]):
    """Fields of a body that are not null."""

    def get(self, name: str, kind: type, default: Any) -> Any:  # type: ignore[override]
        value = super().get(name, default)
        if not isinstance(value, kind):
            raise RequestError(f"{name} must be of type {kind.__name__}.", param=name)
        return value

    def number(self, name: str, least: int, most: int | None = None) -> int | None:
        """A whole number within these bounds; None if there is none."""
        if name not in self:
            return None
        value = self[name]
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < least or (most is not None and value > most):
            limit = f" and at most {most}" if most is not None else ""
            raise RequestError(
                f"{name} must be a whole number, at least {least}{limit}.", param=name
            )
        return value


def _refuse_what_is_not_there(fields: _Fields) -> None:
    for name, harmless in NOT_HERE.items():
        if name in fields and fields[name] not in harmless:
            raise RequestError(
                f"{name} is not supported here: an answer is what the policy "
                "samples, with the log-prob of each of its tokens. Leave it out; what an answer "
                "should be like, ask for in words.",
                param=name,
            )


def _template_kwargs(fields: _Fields) -> dict[str, Any]:
    """Variables of the chat template; effort is one, and without any there are no thoughts."""
    told = fields.get("chat_template_kwargs", dict, {})
    effort = fields.get("reasoning_effort", str, "")
    if not effort:
        return told
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"} | told


def _messages(fields: _Fields) -> list[Message]:
    messages = fields.get("messages", list, [])
    if not messages:
        raise RequestError("messages must be a list with at least one message.", param="messages")
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(
                f"{place} must be an object whose role is one of {', '.join(ROLES)}.", param=place
            )
        _check_calls(message, place)
    return [plain_message(message) for message in messages]


def _check_calls(message: Message, place: str) -> None:
    calls = message.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else None
        texts = [function.get(key, "") for key in ("name", "arguments")] if function else [None]
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            raise RequestError(
                f"{place}.tool_calls must be a list of calls with function.name and "
                "function.arguments, both text.",
                param=f"{place}.tool_calls",
            )


def _text(content: object) -> str:
    """The text of a message's content, which may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RequestError("Only text is supported as content.", param="messages")
    return "".join(map(str, texts))


def _tools(fields: _Fields) -> list[dict[str, Any]] | None:
    tools = fields.get("tools", list, [])
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError("Each of tools needs function.name.", param="tools")
    return tools or None


def _stop(fields: _Fields) -> tuple[str, ...]:
    if "stop" not in fields:
        return ()
    stop: Sequence[object] = (
        [fields["stop"]] if isinstance(fields["stop"], str) else fields.get("stop", list, [])
    )
    if not all(isinstance(text, str) and text for text in stop):
        raise RequestError("stop must be a text or a list of texts.", param="stop")
    return tuple(map(str, stop))
