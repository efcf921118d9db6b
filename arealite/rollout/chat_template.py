"""A chat template as a function from messages to token ids that no message can break out of.

    messages --shield--> --template--> text --split--> ids
             what imitates a control      shielded parts are encoded as plain text,
             token is marked              the template's own control tokens as such

A tokenizer turns the text of a control token, such as `<|im_end|>`, into that token wherever it
stands. Whoever writes it into a message could end their turn and begin one of the assistant's, or
a tool's; here it stays the characters that it is made of.
"""

import contextlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from arealite.errors import DataError, TrajectoryError

Message = dict[str, Any]
"""As in OpenAI's API: `role`, `content`, and `tool_calls`, `tool_call_id`, `reasoning_content`."""

# Around the number of a text in `_imitable`; private use, so that no template does anything to it.
_OPEN, _CLOSE = "\ue0a5", "\ue0a6"
# A message that no template rewrites, to find out what a template does with one.
_PROBE = "arealite-probe"
_PROBE_CALL = {"id": "call00000", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
# Whose text may hold calls and thoughts; that of a user and of a tool is only ever text.
_TRUSTED = ("assistant", "system", "developer")
_TAG = re.compile(r"[^\w\s].*[^\w\s]")
# What stands around calls and thoughts, also where the template does not write it.
_OF_ANSWERS = re.compile("tool|think", re.IGNORECASE)
# DeepSeek's tokens that begin a turn are not among its special ones.
_ROLES = re.compile("user|assistant|system", re.IGNORECASE)
_REFUSALS = (
    *(jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError),
    RecursionError,  # arguments of a call, nested a thousand times
)


def first_messages(question: str | Sequence[Message], system_prompt: str = "") -> list[Message]:
    """What a conversation begins with: a question, or messages as they are.

    Args:
        system_prompt: comes first, unless the messages begin with one of their own; empty: none.

    Raises:
        DataError: it is neither.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if (
        not isinstance(messages, Sequence)
        or not messages
        or not all(isinstance(message, dict) and "role" in message for message in messages)
    ):
        raise DataError(
            f"A conversation begins with {question!r:.80}. It takes a text, or a list of "
            "messages with `role` and `content`."
        )
    if system_prompt and messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system_prompt}, *messages]
    return list(messages)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The template of a tokenizer, with tools and variables; conversations share it.

    Args:
        tools: JSON schemas as `transformers.utils.get_json_schema` makes them.
        kwargs: variables of the template, such as `enable_thinking`.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], *, is_open: bool = True) -> str:
        """The conversation as text, with shielded parts marked; `encode` takes it.

        Args:
            is_open: end with the words that begin the assistant's next turn.

        Raises:
            TrajectoryError: the template refuses these messages.
        """
        try:
            shielded = [self._shield_message(message) for message in messages]
            try:
                text = self._apply(shielded, is_open)
            except TypeError:  # DeepSeek's adds them to text
                text = self._apply([_with_arguments(str, each) for each in shielded], is_open)
            text.encode()  # half of a surrogate pair has no bytes, and so no tokens
            return text
        except _REFUSALS as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TrajectoryError(
                f"The chat template of {self.tokenizer.name_or_path or 'this tokenizer'} does not "
                f"take a conversation of {roles}: {type(error).__name__}: {error}"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of what `render` gave."""
        token_ids: list[int] = []
        for index, part in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", text)):
            if index % 2:
                token_ids += self._spelled[int(part)]
            elif part:
                token_ids += self._encode(part)
        return token_ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text in which nothing is a control token, whatever it imitates."""
        return self.encode(self._shield(text, is_trusted=True))

    @cached_property
    def end_token_id(self) -> int:
        """The control token behind the last answer of a conversation."""
        said = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
        text = self.render(said, is_open=False)
        found = self._control.search(text[text.rindex(_PROBE) :])
        return self._encode(found[0] if found else str(self.tokenizer.eos_token))[0]

    def plain(self, text: str) -> str:
        """What `render` gave, as it reads without marks."""
        return re.sub(f"{_OPEN}(\\d+){_CLOSE}", lambda mark: self._imitable[int(mark[1])], text)

    def end_of_answer(self, text: str, start: int) -> int:
        """Where the answer ends that begins at `start` of what `render` gave; -1: nothing tells."""
        ends = [text.find(end, start) for end in self._turn_ends]
        return min((end for end in ends if end >= 0), default=-1)

    @cached_property
    def _turn_ends(self) -> set[str]:
        """What stands behind an answer that another message follows.

        A control token: the end of a turn, or where a template has none, the beginning of another;
        or else what ends the whole.
        """
        said = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
        ends: set[str] = set()
        for role in ("user", "tool", "system", "assistant"):
            follows = {"role": role, "content": _PROBE, "tool_call_id": _PROBE_CALL["id"]}
            try:
                _, _, behind, *_ = self.render([*said, follows], is_open=False).split(_PROBE)
            except (TrajectoryError, ValueError):  # it takes no tools, or does not show results
                continue
            ends |= {found[0] for found in [self._control.search(behind)] if found}
        if not ends:
            text = self.render(said, is_open=False)
            ends = {text[text.rindex(_PROBE) + len(_PROBE) :].strip()}
        return ends - {""}

    def expresses(self, message: Message) -> bool:
        """Whether the template does something with the calls and thoughts of this message."""
        fields = [name for name in ("tool_calls", "reasoning_content") if message.get(name)]
        return all(name in str(self.tokenizer.chat_template) for name in fields)

    def _apply(self, messages: list[Message], is_open: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=self._shield(self.tools or None, is_trusted=True),
                tokenize=False,
                add_generation_prompt=is_open,
                **self._shield(self.kwargs, is_trusted=False),
            )
        )

    def _encode(self, text: str) -> list[int]:
        # The template has already written every special token.
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _shield_message(self, message: Message) -> Message:
        role = message.get("role")
        if not isinstance(role, str) or not re.fullmatch(r"[\w-]+", role):
            raise ValueError(f"{role!r:.80} is no role, which is one word.")
        if role != "assistant":  # some templates take whoever calls for the assistant
            message = {key: value for key, value in message.items() if key != "tool_calls"}
        elif message.get("tool_calls") and not message.get("content"):
            message = message | {"content": self._no_content}
        return {
            key: self._shield(value, is_trusted=role in _TRUSTED)
            for key, value in _with_arguments(dict, message).items()
        }

    @cached_property
    def _no_content(self) -> str | None:
        """The content of a message that only calls: some templates show its calls only if None."""
        for content in ("", None):
            for arguments in ({}, "{}"):
                call = {**_PROBE_CALL, "function": {"name": _PROBE, "arguments": arguments}}
                message = {"role": "assistant", "content": content, "tool_calls": [call]}
                with contextlib.suppress(*_REFUSALS):
                    if _PROBE in self._apply([{"role": "user", "content": "?"}, message], True):
                        return content
        return ""

    def _shield(self, value: Any, *, is_trusted: bool) -> Any:
        """The value with every text that imitates a control token marked.

        Args:
            is_trusted: of who may write a tool call, or a tool's result.
        """
        if isinstance(value, str):
            pattern = self._control if is_trusted else self._control_and_tools
            return pattern.sub(lambda found: self._mark(found[0]), value)
        if isinstance(value, dict):
            return {
                self._shield(key, is_trusted=is_trusted): self._shield(each, is_trusted=is_trusted)
                for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._shield(each, is_trusted=is_trusted) for each in value]
        return value

    def _mark(self, text: str) -> str:
        return f"{_OPEN}{self._imitable.index(text)}{_CLOSE}"

    @cached_property
    def _imitable(self) -> list[str]:
        """Texts that would become one control token, and the signs that marks are made of."""
        written = str(self.tokenizer.chat_template)
        tags = {text for text in self._tags if _OF_ANSWERS.search(text) or text in written}
        return [_OPEN, _CLOSE, *sorted(tags | self._special)]

    @cached_property
    def _spelled(self) -> list[list[int]]:
        """Token ids of the characters of each text in `_imitable`."""
        return [self._encode(text[:1]) + self._encode(text[1:]) for text in self._imitable]

    @cached_property
    def _special(self) -> set[str]:
        """Texts of tokens that begin and end turns, which only the template may write."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = {str(token.content) for token in tokens if token.special}
        roles = {text for text in self._tags if _ROLES.search(text)}
        return special | roles | set(self.tokenizer.all_special_tokens)

    @cached_property
    def _tags(self) -> list[str]:
        """Added tokens such as `<think>`; others are words, or white space of a certain length."""
        added = self.tokenizer.added_tokens_decoder.values()
        return [str(token.content) for token in added if _TAG.fullmatch(token.content)]

    @cached_property
    def _control_and_tools(self) -> re.Pattern[str]:
        return _any_of(self._imitable)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return _any_of([_OPEN, _CLOSE, *self._special])


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _with_arguments(kind: type, message: Message) -> Message:
    """The message with the arguments of its tool calls as objects, or as text (`str`).

    OpenAI's API has them as JSON in a string, which most templates would quote once more.
    """
    if not message.get("tool_calls"):
        return {key: value for key, value in message.items() if key != "tool_calls"}
    calls = [_converted(kind, call) for call in message["tool_calls"]]
    return message | {"tool_calls": calls}


def _converted(kind: type, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    try:
        if kind is dict and isinstance(arguments, str):
            arguments = json.loads(arguments)
        elif kind is str and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):
        return call  # no JSON, and not ours to mend
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def check_readable(template: ChatTemplate, text: str, token_ids: list[int]) -> None:
    """Raise DataError if more than a quarter of the words is not in the tokens.

    A small vocabulary drops what it has no token for, or makes it unknown, and says nothing.
    """
    kept = _comparable("".join(str(template.tokenizer.decode(token_ids)).split()))
    words = template.plain(text).split()
    words = words[:: 1 + len(words) // 1000]  # each is looked for in the whole
    dropped = [word for word in words if _comparable(word) not in kept]
    if len(dropped) > len(words) / 4:
        raise DataError(
            f"The tokenizer drops {len(dropped)} of the {len(words)} words of a prompt, such as "
            f"{', '.join(map(repr, dropped[:3]))}: its model cannot read these rows. Set `model` "
            "to one that can, or `dataset` to rows that it was made for."
        )


def _comparable(text: str) -> str:
    """The text without accents, of which Unicode has several forms, and in one case."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(each for each in letters if not unicodedata.combining(each)).casefold()
