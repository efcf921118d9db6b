"""From a command line and YAML files to settings: known keys with values of their fields' types.

    text -> YAML nodes -> Setting(key, value), or a Problem in words, for each value

What is wrong with the input does not raise: the user is to see every problem at once. How texts are
read is described in arealite/config.py.
"""

import contextlib
import difflib
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import yaml

from arealite.config_schema import Schema, alternatives, kind_text, value_text

MAX_FILE_BYTES = 100_000
MAX_YAML_NODES = 5_000  # with aliases written out: an alias bomb is small on disk
MAX_YAML_DEPTH = 20

_NULLS = ("", "~", "null", "Null", "NULL")
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp", "value")

_MIN_LIKENESS = 0.5  # below it, a suggestion only confuses


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One value that the user gave."""

    key: str  # dotted
    value: object
    shown: str  # as the user wrote it
    where: str  # " (run.yaml:3)"; empty for the command line


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One line for the user."""

    line: str
    keys: frozenset[str] = frozenset()  # whose values are at fault
    section: str = ""  # that complained


Found = Setting | Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What a command line asks for."""

    flags: list[str]  # --help, --explain
    files: list[str]  # of --config
    found: list[Found]


# -- From text to settings -----------------------------------------------------------------------


def read_arguments(argv: Sequence[str], schema: Schema) -> Arguments:
    """The words of a command line, sorted by what they are; files are not read yet."""
    arguments = Arguments(flags=[], files=[], found=[])
    words = iter(argv)
    for word in words:
        name, has_value, value = word.partition("=")
        if word in ("-h", "--help", "--explain"):
            arguments.flags.append("--help" if word == "-h" else word)
        elif name == "--config":
            arguments.files.append(value if has_value else next(words, ""))
        elif name.startswith("-"):
            key = _nearest(name.lstrip("-"), schema) or "key"
            line = f"{_cut(word)} is not an option. Write keys without dashes: {key}=value."
            arguments.found.append(Problem(line=line))
        elif not has_value or not name:
            line = f"{_cut(word)} is not key=value. Write it so, without spaces around `=`."
            arguments.found.append(Problem(line=line))
        else:
            arguments.found.extend(_read_pair(word, schema))
    return Arguments(
        flags=arguments.flags, files=arguments.files, found=list(_once(arguments.found))
    )


def read_file(name: str, schema: Schema) -> list[Found]:
    """The settings in one YAML file."""
    try:
        path = Path(name).expanduser()
        if not name or not path.is_file():
            return [Problem(line=f"--config {_cut(name)}: there is no such file. Give its path.")]
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes")
        root = _compose(content.decode("utf-8-sig"))
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ValueError(f"it holds {_shown(root)} instead of lines such as `key: value`")
    except UnicodeDecodeError:
        return [Problem(line=f"--config {_cut(name)} is not UTF-8 text. Save it as such.")]
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ without a home folder
        return [Problem(line=f"--config {_cut(name)} cannot be read: {error}. Correct the file.")]
    return list(_once(_flatten(root, "", name, schema))) if root else []


def _read_pair(pair: str, schema: Schema) -> Iterator[Found]:
    """The settings in one `key=value`; several if the value is a mapping for a whole section."""
    key, _, text = pair.partition("=")
    try:
        pair.encode()
        node = _text_node(text, schema.knobs.get(key)) or _compose(text) or _scalar(text)
    except ValueError as error:
        advice = "Quote what has special characters, and for the shell the whole: 'key=[\"a: b\"]'."
        line = f"{_cut(pair)} cannot be read: {error}. {advice}"
        yield Problem(line=line, keys=frozenset({key}))
    else:
        yield from _flatten(node, key, "", schema)


def _text_node(text: str, kind: object) -> yaml.Node | None:
    """For a knob that takes texts, `text` as it is: on a command line `:` and `#` are just text."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_null = text in _NULLS and (text != "" or NoneType in alternatives(kind))
    if str not in alternatives(kind) or is_quoted or is_null:
        return None
    return _scalar(text, style='"')


def _scalar(text: str, style: str | None = None) -> yaml.ScalarNode:
    return yaml.ScalarNode(f"{_TAG}str", text, style=style)


def _compose(text: str) -> yaml.Node | None:
    """The YAML document as nodes, None if it is empty. No tag constructs anything here.

    Raises ValueError if it is not YAML, too large or too deep.
    """
    try:
        # Not the C parser, nor OmegaConf's loader, which is built on it: deep nesting crashes them.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        advice = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise ValueError(f"{place}{error.problem}{advice}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    waiting, num_nodes = [(root, 0)] if root else [], 0
    while waiting:
        node, depth = waiting.pop()
        num_nodes += 1
        if depth > MAX_YAML_DEPTH:
            raise ValueError("it is nested too deeply, or an alias contains itself")
        if num_nodes > MAX_YAML_NODES:
            raise ValueError(f"it has more than {MAX_YAML_NODES:,} values, aliases written out")
        waiting += [(child, depth + 1) for child in _children(node)]
    return root


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _flatten(node: yaml.Node, key: str, file: str, schema: Schema) -> Iterator[Found]:
    """The settings at and below `key`."""
    where, shown, complaint = _where(node, file), _shown(node), ""
    if key in schema.knobs:
        try:
            value = _convert(node, schema.knobs[key])
            yield Setting(key=key, value=value, shown=shown, where=where)
        except ValueError as error:
            complaint = str(error)
    elif key not in schema.sections:
        nearest = _nearest(key, schema)
        suggestion = f"The nearest is {nearest}; " if nearest else ""
        complaint = f"is not a key. {suggestion}--help lists all."
    elif key in schema.optional and _is_null(node):
        yield Setting(key=key, value=None, shown=shown, where=where)
    elif not isinstance(node, yaml.MappingNode) or not _is_plain(node):
        first = next((name for name in schema.knobs if name.startswith(f"{key}.")), key)
        complaint = f"cannot be: {key} has keys of its own. Set those, such as {first}=value."
    else:
        if key in schema.optional:
            yield Setting(key=key, value={}, shown=shown, where=where)
        yield from _flatten_section(node, key, file, schema)
    if complaint:
        yield Problem(line=f"{_cut(key)}={shown}{where} {complaint}", keys=frozenset({key}))


def _flatten_section(
    section: yaml.MappingNode, key: str, file: str, schema: Schema
) -> Iterator[Found]:
    inner_sections: set[str] = set()
    for name_node, node in _pairs(section):
        name = (f"{key}." if key else "") + (_shown(name_node) or "''")
        if name in inner_sections:
            yield _given_twice(name, _shown(node), _where(node, file))
        if name in schema.sections:
            inner_sections.add(name)
        yield from _flatten(node, name, file, schema)


def _pairs(mapping: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """Its keys and values, then those of its merge keys (<<) that it does not have itself."""
    pairs = [(name, node) for name, node in mapping.value if name.tag != f"{_TAG}merge"]
    names = {name.value for name, _ in pairs if isinstance(name, yaml.ScalarNode)}
    for merge_key, merged in mapping.value:
        if merge_key.tag != f"{_TAG}merge":
            continue
        for source in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
            if not isinstance(source, yaml.MappingNode):
                pairs.append((merge_key, source))  # reported as the unknown key <<
                continue
            new = [pair for pair in _pairs(source) if _shown(pair[0]) not in names]
            names |= {_shown(name) for name, _ in new}
            pairs += new
    return pairs


def _once(found: Iterable[Found]) -> Iterator[Found]:
    """The same, and a problem for each key that comes again."""
    seen: set[str] = set()
    for one in found:
        if isinstance(one, Setting) and one.key in seen:
            yield _given_twice(one.key, one.shown, one.where)
        else:
            yield one
        seen |= {one.key} if isinstance(one, Setting) else one.keys


def _given_twice(key: str, shown: str, where: str) -> Problem:
    line = f"{key}={shown}{where} comes after another value for {key}. Keep one of them."
    return Problem(line=line, keys=frozenset({key}))


def _nearest(key: str, schema: Schema) -> str:
    """The valid key most like `key`, which may also lack its section or have a wrong one.

    Empty if none is much like it.
    """
    last = _cut(key.rpartition(".")[2])

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, _cut(key), candidate).ratio()
        end = difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()
        return max(whole, end) + whole / 100

    keys = [key for key in (*schema.knobs, *schema.sections) if key]
    nearest = max(keys, key=likeness, default="")
    return nearest if nearest and likeness(nearest) >= _MIN_LIKENESS else ""


def _where(node: yaml.Node, file: str) -> str:
    return f" ({file}:{node.start_mark.line + 1})" if file else ""


def _shown(node: yaml.Node) -> str:
    """What the user wrote, in short."""
    if isinstance(node, yaml.ScalarNode):
        return _cut(node.value)
    if isinstance(node, yaml.MappingNode):
        return "{...}" if node.value else "{}"
    items = [item.value if isinstance(item, yaml.ScalarNode) else "..." for item in node.value]
    return _cut(f"[{', '.join(items)}]")


def _cut(text: str) -> str:
    """`text` on one line of at most 80 characters."""
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


# -- From text to values -------------------------------------------------------------------------


def _convert(node: yaml.Node, kind: object) -> object:
    """The node as a value of the type `kind`; tuples come as lists.

    Raises ValueError with what it is not and what to write, to be read after `key=value`.
    """
    if not _is_plain(node):
        tag = _cut(node.tag.removeprefix(_TAG))
        raise ValueError(f"has the YAML tag {tag}. Write a plain value without a tag.")
    if _is_null(node):
        if NoneType in alternatives(kind):
            return None
        raise ValueError("is empty, and this key needs a value. Set one or leave the key out.")
    if isinstance(node, yaml.ScalarNode) and "${" in node.value:
        return node.value  # OmegaConf resolves it and checks what comes out
    complaint = ""
    for alternative in alternatives(kind):
        try:
            if alternative is not NoneType:
                return _convert_to(node, alternative)
        except ValueError as error:
            complaint = complaint or str(error)
    raise ValueError(complaint)


def _convert_to(node: yaml.Node, kind: Any) -> object:
    if typing.get_origin(kind) is tuple:
        return _list(node, typing.get_args(kind))
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"is not a single value. Write one {kind_text(kind)}.")
    if typing.get_origin(kind) is not Literal:
        return _READERS[kind](node.value)
    for option in typing.get_args(kind):
        if node.value == value_text(option):
            return option
    raise ValueError(f"is not possible. Write one of {kind_text(kind)}.")


def _list(node: yaml.Node, kinds: tuple[Any, ...]) -> list[object]:
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError("is not a list. Write [a, b], or [a] for a single value, or [] for none.")
    if kinds[-1:] == (...,):
        return [_convert(item, kinds[0]) for item in node.value]
    if len(node.value) != len(kinds):
        raise ValueError(f"has {len(node.value)} values. Write {len(kinds)}.")
    return [_convert(item, kind) for item, kind in zip(node.value, kinds, strict=True)]


def _int(text: str) -> int:
    # No leading zero: 010 is 8 in YAML and 10 to its reader.
    if re.fullmatch(r"[-+]?(0|[1-9](_?[0-9]){,40})", text):
        if -(2**63) <= int(text) < 2**63:
            return int(text)
        raise ValueError("does not fit into 64 bits. Write a smaller number.")
    advice = "digits, such as 1000"
    with contextlib.suppress(ValueError):
        if float(text).is_integer() and abs(float(text)) < 2**63:
            advice = str(int(float(text)))
    raise ValueError(f"is not a whole number. Write {advice}.")


def _float(text: str) -> float:
    try:
        value = float(text) if text.isascii() else math.nan
    except ValueError:
        raise ValueError("is not a number. Write one such as 0.5 or 1e-4.") from None
    if not math.isfinite(value):
        raise ValueError("is not a finite number. Write one such as 0.5 or 1e-4.")
    return value


def _bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError("is neither true nor false. Write one of the two.")


def _str(text: str) -> str:
    if text == "???":
        raise ValueError("is OmegaConf's mark for a missing value. Set another one.")
    return text


_READERS: dict[Any, Callable[[str], object]] = {int: _int, float: _float, bool: _bool, str: _str}


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in _NULLS


def _is_plain(node: yaml.Node) -> bool:
    return node.tag.startswith(_TAG) and node.tag.removeprefix(_TAG) in _PLAIN_TAGS
