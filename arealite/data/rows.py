"""Rows of a data set: embedded, from files, or from the Hugging Face Hub.

    where  --place, content-->  formats.py  --question, answer-->  checked  -->  rows

Rows come one after the other, so that a set of millions that repeats thousands needs little memory.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from arealite.data import gsm8k_large, gsm8k_mini, mini_preferences, tiny_programs
from arealite.data.formats import as_object, format_of, identity_of
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
_WITHOUT_ANSWER = {"agentica-org/DeepScaleR-Preview-Dataset": 6}
"""So many rows of a set on the Hub have no answer, and are left out without being asked to."""
MAX_ROWS_FOR_TEST = 500
"""Of a set that has no rows of its own to test with."""
_BATCH = 1_000

_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")

_log = logging.getLogger(__name__)


def load_rows(
    dataset: str,
    *,
    split: str,
    required: tuple[str, ...] = ("question", "answer"),
    max_malformed: int = 0,
) -> list[Row]:
    """The rows of one split, with `question` and `answer`, once each is known to be usable.

    A row that has no `question` may be of one of the formats of docs/data.md; what it then asks and
    what is right is put beside the keys that it has. A row that is there twice, by `index` and
    content, is taken once.

    Args:
        dataset: an embedded one such as `arealite/gsm8k-mini`; or a folder with `<split>.jsonl`,
            `.json` or `.parquet` (shards named `<split>-*.parquet`, also below `data/`, count); or
            one such file, or a set of one split, which serves every split: all of it for `train`,
            at most 500 rows of it for another; or a Hub id. `id:config` picks a
            configuration; without it the only one is taken, or `main`, or `default`. `id:x.jsonl`
            is one file of a set on the Hub.
        split: `train`, `test`, or what else the data set has.
        required: keys that must hold a non-empty string in every row; `question` may also hold a
            list of messages, for a conversation that has begun, and `answer` a list of strings, of
            which each is right.
        max_malformed: so many rows may be unusable; they are left out, and the log says why.

    Raises DataError that names the file and the row (from 1; in JSON Lines, the line).
    """
    rows: list[Row] = []
    malformed: list[DataError] = []
    seen: set[bytes] = set()
    num_repeats = 0
    may_be_malformed = max(max_malformed, _WITHOUT_ANSWER.get(dataset, 0))
    found, is_stand_in = _read(dataset, split)
    for place, row in found:
        identity = identity_of(row)
        if identity in seen:
            num_repeats += 1
            continue
        if identity is not None:
            seen.add(identity)
        try:
            rows.append(_checked(row, place, required))
        except DataError as error:
            malformed.append(error)
            if len(malformed) > may_be_malformed:
                raise
    _tell_what_is_left_out(dataset, len(rows), malformed, num_repeats)
    if not rows:
        raise DataError(f"Split {split!r} of {dataset} has no rows.")
    if is_stand_in and split != "train":
        rows = _spread(rows, MAX_ROWS_FOR_TEST)
        _log.warning("%s: its %s rows are %d of its train rows.", dataset, split, len(rows))
    return rows


def _spread(rows: list[Row], count: int) -> list[Row]:
    """At most so many of the rows, the first among them."""
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _tell_what_is_left_out(
    dataset: str, num_rows: int, malformed: list[DataError], num_repeats: int
) -> None:
    if malformed:
        _log.warning(
            "%d of %d rows are left out: %s",
            len(malformed),
            num_rows + len(malformed),
            " ".join(map(str, malformed[:5])),
        )
    if num_repeats:
        _log.warning(
            "%s: %d rows repeat the index and content of an earlier one; the %d others are taken.",
            dataset,
            num_repeats,
            num_rows,
        )


Rows = Iterator[tuple[str, object]]
"""Where each row is, in words, and what is there."""


def _read(dataset: str, split: str) -> tuple[Rows, bool]:
    """The rows, and whether they stand in for a split that is not there."""
    if dataset in _EMBEDDED:
        splits = _EMBEDDED[dataset]
        if split not in splits:
            raise _missing_split(dataset, split, list(splits))
        return _numbered(dataset, splits[split]()), False
    path = local_path(dataset)
    if path is None:
        name = dataset.partition(":")[0]
        if Path(name).suffix in _ENDINGS or not is_hub_id(name):
            raise DataError(f"There is no file or folder {dataset!r}. {_WANTED}")
        return _read_hub(dataset, split)
    if path.is_dir():
        return chain.from_iterable(map(_read_file, _files_of(path, split))), False
    return _read_file(path), path.stem != split


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


def _read_file(path: Path) -> Rows:
    try:
        if path.suffix == ".parquet":
            yield from _numbered(str(path), _parquet_rows(path))
        elif path.suffix in _ENDINGS:
            yield from _json_rows(path, path.read_bytes())
        else:
            raise DataError(f"{path} ends in none of {', '.join(_ENDINGS)}. {_WANTED}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _numbered(name: str, rows: Iterable[object]) -> Rows:
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    # Here and not at the top: importing it takes longer than most runs spend in this module.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _json_rows(path: Path, content: bytes) -> Rows:
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
    row = as_object(row)
    if not isinstance(row, dict):
        raise DataError(f"{place} is a {type(row).__name__}, not an object with keys and values.")
    row_format = format_of(row) if "question" in required else None
    if row_format is not None:
        place = f"{place}, in the format of {row_format.name},"
        try:
            row = row_format.read(row, required)
        except DataError as error:
            raise DataError(f"{place} {error}.") from None
    for key in required:
        if key not in row:
            raise DataError(
                f"{place} has no {key!r}. Its keys: {', '.join(map(repr, row)) or 'none'}."
            )
        problem = _PROBLEMS.get((key, type(row[key])), _problem_with)(row[key])
        if problem:
            made = row_format.made_of(key) if row_format else ""
            raise DataError(f"{place}: {key!r}{made} {problem}.")
    return row


def _problem_with(value: object) -> str | None:
    """What keeps a field from being text that a model can read, or None."""
    if not isinstance(value, str):
        return f"is of type {type(value).__name__}; it must be a string"
    if not value.strip():
        return "is empty"
    found = _NOT_TEXT.search(value)
    if found is None:
        return None
    if found[0] == "\x00":
        return "contains a NUL character"
    return "contains half of a surrogate pair, which is not text"


def _problem_with_answers(answers: list[object]) -> str | None:
    """What keeps a list from being one of accepted answers, or None."""
    if not answers:
        return "is empty"
    problem = next(filter(None, map(_problem_with, answers)), None)
    return f"has an element that {problem}" if problem else None


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


_PROBLEMS: dict[tuple[str, type], Callable[[Any], str | None]] = {
    ("question", list): _problem_with_messages,
    ("answer", list): _problem_with_answers,
}
"""What a field may be beside text."""


def _read_hub(dataset: str, split: str) -> tuple[Rows, bool]:
    """As `_read`; a set of one split stands in for every other."""
    name, _, wanted = dataset.partition(":")
    if wanted.endswith(_ENDINGS):
        path = _file_from_hub(name, wanted)
        return _read_file(path), path.stem != split
    # Here and not at the top: importing it takes seconds, and most runs never need it.
    import datasets

    try:
        config = wanted or _default_config(name, datasets.get_dataset_config_names(name))
        splits = [str(found) for found in datasets.get_dataset_split_names(name, config)]
        if split not in splits and len(splits) > 1:
            raise _missing_split(dataset, split, splits)
        rows = datasets.load_dataset(name, config, split=split if split in splits else splits[0])
    except DataError:
        raise
    except Exception as error:  # datasets has no common parent for what the network may do to it
        raise _no_answer_from_hub(name, error) from error
    return _numbered(dataset, _rows_of(rows)), split not in splits


def _rows_of(found: Any) -> Iterator[Row]:
    # Batches of arrow: row by row, `datasets` takes several times as long.
    for batch in found.with_format("arrow").iter(_BATCH):
        yield from batch.to_pylist()


def _file_from_hub(name: str, file: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, file, repo_type="dataset"))
    except Exception as error:  # as above
        raise _no_answer_from_hub(name, error) from error


def _no_answer_from_hub(name: str, error: Exception) -> DataError:
    return DataError(
        f"There is no folder {name!r}, and the Hugging Face Hub did not give the data set: "
        f"{type(error).__name__}: {error}. Check the name and the network, or give a folder."
    )


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
