"""Rows of a data set: embedded, from files, or from the Hugging Face Hub."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from arealite.data import gsm8k_large, gsm8k_mini, mini_preferences, tiny_programs
from arealite.data.paths import is_hub_id, local_path
from arealite.errors import DataError
from arealite.types import Row

GSM8K_MINI = "arealite/gsm8k-mini"
"""Name of an embedded data set: generated word problems, offline, the same on every machine."""
GSM8K_LARGE = "arealite/gsm8k-large"
"""The same with numbers that a tiny model cannot compute with, but a tool can."""
TINY_PROGRAMS = "arealite/tiny-programs"
"""Name of an embedded data set: generated programming tasks, with `tests` in every row."""
MINI_PREFERENCES = "arealite/mini-preferences"
"""Name of an embedded data set: to each problem of gsm8k-mini a chosen and a rejected answer."""

_EMBEDDED: dict[str, dict[str, Callable[[], list[Row]]]] = {
    GSM8K_MINI: {"train": gsm8k_mini.train_problems, "test": gsm8k_mini.test_problems},
    GSM8K_LARGE: {"train": gsm8k_large.train_problems, "test": gsm8k_large.test_problems},
    MINI_PREFERENCES: {
        "train": mini_preferences.train_pairs,
        "test": mini_preferences.test_pairs,
    },
    TINY_PROGRAMS: {"train": tiny_programs.train_programs, "test": tiny_programs.test_programs},
}
_ENDINGS = (".jsonl", ".json", ".parquet")
_WANTED = (
    f"A data set is embedded ({', '.join(_EMBEDDED)}), a folder with train and test files, a file "
    f"({', '.join(_ENDINGS)}), or an id on the Hugging Face Hub such as 'openai/gsm8k'."
)

_log = logging.getLogger(__name__)


def load_rows(
    dataset: str,
    *,
    split: str,
    required: tuple[str, ...] = ("question", "answer"),
    max_malformed: int = 0,
) -> list[Row]:
    """The rows of one split, as they are, once each of them is known to be usable.

    Args:
        dataset: an embedded one such as `arealite/gsm8k-mini`; or a folder with `<split>.jsonl`,
            `.json` or `.parquet` (shards named `<split>-*.parquet`, also below `data/`, count); or
            one such file, which then serves every split; or a Hub id. `id:config` picks a
            configuration; without it the only one is taken, or `main`, or `default`.
        split: `train`, `test`, or what else the data set has.
        required: keys that must hold a non-empty string in every row; `question` may also hold a
            list of messages, for a conversation that has begun.
        max_malformed: so many rows may be unusable; they are left out, and the log says why.

    Raises DataError that names the file and the row (from 1; in JSON Lines, the line).
    """
    rows: list[Row] = []
    malformed: list[DataError] = []
    for place, row in _read(dataset, split):
        try:
            rows.append(_checked(row, place, required))
        except DataError as error:
            malformed.append(error)
            if len(malformed) > max_malformed:
                raise
    if malformed:
        _log.warning(
            "%d of %d rows are left out: %s",
            len(malformed),
            len(rows) + len(malformed),
            " ".join(map(str, malformed[:5])),
        )
    if not rows:
        raise DataError(f"Split {split!r} of {dataset} has no rows.")
    return rows


def _read(dataset: str, split: str) -> Iterator[tuple[str, object]]:
    """Where each row is, in words, and what is there."""
    if dataset in _EMBEDDED:
        splits = _EMBEDDED[dataset]
        if split not in splits:
            raise _missing_split(dataset, split, list(splits))
        yield from _numbered(dataset, splits[split]())
        return
    path = local_path(dataset)
    if path is None:
        if Path(dataset).suffix in _ENDINGS or not is_hub_id(dataset.partition(":")[0]):
            raise DataError(f"There is no file or folder {dataset!r}. {_WANTED}")
        yield from _read_hub(dataset, split)
    elif path.is_dir():
        for file in _files_of(path, split):
            yield from _read_file(file)
    else:
        if split != "train":
            _log.warning("%s is one file, so the %s rows are its train rows.", path, split)
        yield from _read_file(path)


def _files_of(folder: Path, split: str) -> list[Path]:
    parts = [part for part in (folder, folder / "data") if part.is_dir()]
    for part in parts:
        whole = [part / f"{split}{ending}" for ending in _ENDINGS]
        files = [file for file in whole if file.is_file()][:1]
        files = files or sorted(part.glob(f"{split}-*.parquet"))
        if files:
            return files
    found = sorted(
        file.name for part in parts for file in part.iterdir() if file.suffix in _ENDINGS
    )
    raise _missing_split(str(folder), split, found)


def _missing_split(dataset: str, split: str, found: list[str]) -> DataError:
    there = f"There are: {', '.join(found)}." if found else "There is no file of rows in it."
    return DataError(f"{dataset} has no split {split!r}. {there}")


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    try:
        if path.suffix == ".parquet":
            yield from _numbered(str(path), _parquet_rows(path))
        elif path.suffix in _ENDINGS:
            yield from _json_rows(path, path.read_bytes())
        else:
            raise DataError(f"{path} ends in none of {', '.join(_ENDINGS)}. {_WANTED}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _numbered(name: str, rows: list[Row]) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _parquet_rows(path: Path) -> list[Row]:
    # Here and not at the top: importing it takes longer than most runs spend in this module.
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _json_rows(path: Path, content: bytes) -> Iterator[tuple[str, object]]:
    content = content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
    if content.lstrip().startswith(b"["):
        rows = _parse(content, str(path))
        assert isinstance(rows, list)
        yield from _numbered(str(path), rows)
        return
    # Not splitlines(): it also splits at characters that are allowed inside a JSON string.
    for number, line in enumerate(content.rstrip().split(b"\n"), start=1):
        if content.strip():
            place = f"{path}, line {number}"
            try:
                yield place, _parse(line, place)
            except DataError as error:
                yield place, error


def _parse(content: bytes, place: str) -> object:
    if not content.strip():
        raise DataError(f"{place} is empty. Remove it.")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 text: {error}. Convert the file.") from error
    except json.JSONDecodeError as error:
        where = f"at character {error.pos + 1}"
        raise DataError(f"{place} is not valid JSON: {error.msg} {where}.") from error
    except (ValueError, RecursionError) as error:  # a huge number, a deep nesting
        raise DataError(f"{place} is not valid JSON: {error}.") from error


def _checked(row: object, place: str, required: tuple[str, ...]) -> Row:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{place} is a {type(row).__name__}, not an object with keys and values.")
    for key in required:
        if key not in row:
            raise DataError(
                f"{place} has no {key!r}. Its keys: {', '.join(map(repr, row)) or 'none'}."
            )
        is_conversation = key == "question" and isinstance(row[key], list)
        problem = (_problem_with_messages if is_conversation else _problem_with)(row[key])
        if problem:
            raise DataError(f"{place}: {key!r} {problem}.")
    return row


def _problem_with(value: object) -> str | None:
    """What keeps a field from being text that a model can read, or None."""
    if not isinstance(value, str):
        return f"is of type {type(value).__name__}; it must be a string"
    if not value.strip():
        return "is empty"
    if "\x00" in value:
        return "contains a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "contains half of a surrogate pair, which is not text"
    return None


def _problem_with_messages(messages: list[object]) -> str | None:
    """What keeps a list from being the beginning of a conversation, or None."""
    if not messages:
        return "is empty"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return (
                f"is of type list and has no message with a role at place {number}: {message!r:.80}"
            )
        # A call of a tool may stand alone, and a tool may say nothing.
        may_be_empty = message["role"] == "tool" or message.get("tool_calls")
        content = message.get("content")
        problem = None if may_be_empty and not content else _problem_with(content)
        if problem:
            return f"has a message at place {number} whose content {problem}"
    return None


def _read_hub(dataset: str, split: str) -> Iterator[tuple[str, object]]:
    # Here and not at the top: importing it takes seconds, and most runs never need it.
    import datasets

    name, _, wanted = dataset.partition(":")
    try:
        config = wanted or _default_config(name, datasets.get_dataset_config_names(name))
        splits = datasets.get_dataset_split_names(name, config)
        if split not in splits:
            raise _missing_split(dataset, split, [str(found) for found in splits])
        rows = datasets.load_dataset(name, config, split=split)
    except DataError:
        raise
    except Exception as error:  # datasets has no common parent for what the network may do to it
        raise DataError(
            f"There is no folder {dataset!r}, and the Hugging Face Hub did not give the data set: "
            f"{type(error).__name__}: {error}. Check the name and the network, or give a folder."
        ) from error
    yield from _numbered(dataset, [dict(row) for row in rows])


def _default_config(name: str, configs: list[str]) -> str:
    for config in ("main", "default"):
        if config in configs:
            return config
    if len(configs) == 1:
        return configs[0]
    raise DataError(
        f"{name} has {len(configs)} configurations and none called main: {', '.join(configs)}. "
        f"Name one: '{name}:{configs[0]}'."
    )
