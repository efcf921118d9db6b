"""Files of JSON lines that survive a kill, a full disk and a resumed run.

One line is one JSON object with a `version`. A line is appended by a single write; a line that
was cut off by a kill or a full disk is skipped by readers and removed by the next resume.
"""

import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from arealite.observe.terminal import warn


class _Versioned(msgspec.Struct):
    """The one field that is needed to decide whether a line stays; the others are not decoded."""

    version: int


class JsonLines:
    """Appends to one file. A disk error is reported once and never raised: training goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_warned = False

    def append(self, records: Iterable[Any]) -> None:
        """Add one line per record (a dict, a dataclass or a msgspec.Struct) in one write."""
        lines = msgspec.json.Encoder().encode_lines(records)
        try:
            with self.path.open("a+b", buffering=0) as file:
                _end_cut_off_line(file)
                if file.write(lines) != len(lines):  # a filling disk takes the first part only
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._report(error)

    def drop_from(self, version: int) -> int:
        """Remove the lines of `version` and later, and cut-off ones; returns how many."""
        path = self.path.resolve()
        if not path.is_file():
            return 0
        try:
            with path.open("rb") as lines:
                keeps = [_is_before(line, version) for line in lines]
            if not all(keeps):
                _rewrite(path, keeps)
            return keeps.count(False)
        except OSError as error:
            self._report(error)
            return 0

    def _report(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"{self.path} could not be written ({error.strerror}). Training continues and the "
                "lines that fail are lost; free some space on that disk."
            )


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of one file in order, without lines that were cut off."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = msgspec.json.decode(line, type=dict[str, Any])
            except ValueError:  # msgspec's errors and UnicodeDecodeError are ValueErrors
                continue
            if isinstance(record.get("version"), int):
                yield record


def _end_cut_off_line(file: io.FileIO) -> None:
    is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)  # a device cannot be read back
    if is_regular and file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _is_before(line: bytes, version: int) -> bool:
    try:
        return msgspec.json.decode(line, type=_Versioned).version < version
    except ValueError:
        return False


def _rewrite(path: Path, keeps: list[bool]) -> None:
    """Replace the file by its lines to keep; a kill leaves the one or the other."""
    partial = path.with_name(f".{path.name}.partial")
    with path.open("rb") as lines, partial.open("wb") as kept:
        kept.writelines(line for line, keep in zip(lines, keeps, strict=True) if keep)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(partial, path)
