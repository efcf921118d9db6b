import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.observe.json_lines import JsonLines, read_json_lines

RECORDS = [{"version": version, "text": "é\n"} for version in (1, 2, 2, 3)]


def file_with(path: Path, records: list[dict]) -> JsonLines:
    lines = JsonLines(path)
    lines.append(records)
    return lines


def test_what_was_appended_is_read_back_one_object_per_line(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    file_with(path, RECORDS)
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS
    assert list(read_json_lines(path)) == RECORDS


@given(st.data())
def test_a_kill_in_the_middle_of_a_write_costs_only_that_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = tmp_path_factory.mktemp("kill") / "lines.jsonl"
    file_with(path, RECORDS)
    content = path.read_bytes()
    length = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:length])
    whole = content[: length + 1].count(b"}\n")  # a line may do without its line break

    assert list(read_json_lines(path))[:whole] == RECORDS[:whole]
    file_with(path, [{"version": 9}])
    assert list(read_json_lines(path))[-1] == {"version": 9}
    assert list(read_json_lines(path))[:whole] == RECORDS[:whole]


def test_lines_of_later_versions_are_dropped_and_counted(tmp_path: Path):
    lines = file_with(tmp_path / "lines.jsonl", RECORDS)
    assert lines.drop_from(2) == 3
    assert list(read_json_lines(lines.path)) == RECORDS[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]


def test_dropping_nothing_leaves_the_file_as_it_is(tmp_path: Path):
    lines = file_with(tmp_path / "lines.jsonl", RECORDS)
    before = lines.path.stat()
    assert lines.drop_from(4) == 0
    assert lines.path.stat().st_ino == before.st_ino
    assert JsonLines(tmp_path / "absent.jsonl").drop_from(0) == 0


def test_dropping_removes_a_line_that_was_cut_off(tmp_path: Path):
    lines = file_with(tmp_path / "lines.jsonl", RECORDS)
    with lines.path.open("ab") as file:
        file.write(b'{"version": 1, "te')
    assert lines.drop_from(4) == 1
    assert list(read_json_lines(lines.path)) == RECORDS


def test_a_full_disk_is_reported_once_and_never_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "lines.jsonl"
    path.symlink_to("/dev/full")
    lines = JsonLines(path)
    for version in range(3):
        lines.append([{"version": version}])
    assert lines.drop_from(0) == 0
    warning = capsys.readouterr().err
    assert warning.count("No space left on device") == 1
    assert str(path) in warning


def test_writing_goes_on_when_the_disk_has_space_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "lines.jsonl"
    path.symlink_to("/dev/full")
    lines = JsonLines(path)
    lines.append([{"version": 1}])
    path.unlink()
    lines.append([{"version": 2}])
    assert list(read_json_lines(path)) == [{"version": 2}]
    assert "could not be written" in capsys.readouterr().err
