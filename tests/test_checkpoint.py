import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from arealite import checkpoint, dist
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.errors import CheckpointError, ConfigError
from arealite.types import Cursor
from tests.observe.ranks import run_on_two_ranks

CURSOR_1 = Cursor(version=1, next_row=20, pending=(17,))
CURSOR_2 = Cursor(version=2, next_row=36, pending=(33, 35))


class FakeEngine:
    """Its state is one word, which it saves in two halves, in files of each rank."""

    def __init__(self, state: str = "") -> None:
        self.state = state
        self.failure: BaseException | None = None

    def save(self, path: Path) -> None:
        for name, half in (("left", self.state[:2]), ("right", self.state[2:])):
            file = path / f"rank{dist.rank()}" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(half[:1])
            checkpoint._write_point(f"half of {name} written")
            file.write_text(half)
            checkpoint._write_point(f"{name} written")
        if self.failure is not None:
            raise self.failure

    def load(self, path: Path) -> None:
        if self.failure is not None:
            raise self.failure
        folder = path / f"rank{dist.rank()}"
        self.state = (folder / "left").read_text() + (folder / "right").read_text()

    def logprobs(self, minibatch: Any) -> Any: ...
    def step(self, minibatch: Any, loss_fn: Any) -> Any: ...
    def named_weights(self) -> Iterator[Any]: ...
    def close(self) -> None: ...


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test catches it."""


def fail_at(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: BaseException,
    *,
    names: Callable[[str], bool] = lambda name: True,
) -> None:
    """Raise at the write point of this number, of those whose name fits."""
    points = iter(range(1, 1_000))

    def write_point(name: str) -> None:
        if names(name) and next(points) == number:
            raise error

    monkeypatch.setattr(checkpoint, "_write_point", write_point)


def loaded(out_dir: Path) -> tuple[Cursor, str]:
    engine = FakeEngine()
    return load_checkpoint(out_dir, engine), engine.state


def names_in(out_dir: Path) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def flip(path: Path, position: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, FakeEngine("old!"), CURSOR_1)
    save_checkpoint(tmp_path, FakeEngine("new!"), CURSOR_2)
    return tmp_path


def test_a_new_run_starts_from_zero_and_leaves_the_engine_alone(tmp_path: Path):
    engine = FakeEngine("untouched")
    assert load_checkpoint(tmp_path, engine) == Cursor(version=0, next_row=0, pending=())
    assert engine.state == "untouched"


def test_a_run_continues_where_it_was_saved(tmp_path: Path):
    folder = save_checkpoint(tmp_path, FakeEngine("abcd"), CURSOR_2)
    assert folder == tmp_path / "checkpoints" / "version-00000002"
    assert loaded(tmp_path) == (CURSOR_2, "abcd")


def test_saving_what_was_loaded_writes_the_same_bytes(two_checkpoints: Path):
    folder = two_checkpoints / "checkpoints" / "version-00000002"
    engine = FakeEngine()
    cursor = load_checkpoint(two_checkpoints, engine)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    save_checkpoint(two_checkpoints, engine, cursor)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_sha256sum_confirms_the_manifest(two_checkpoints: Path):
    folder = two_checkpoints / "checkpoints" / "version-00000002"
    subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=folder, check=True)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["engine/rank0/left"] == {
        "size_bytes": 2,
        # printf ne | sha256sum
        "sha256": "cb58e4600bf0142cbe4ad513de98b73c5c9da7f4023a393d13b395375fccaea6",
    }


def test_only_the_newest_two_stay(tmp_path: Path):
    for version in (10, 20, 30):
        save_checkpoint(tmp_path, FakeEngine("abcd"), Cursor(version=version))
    assert names_in(tmp_path) == ["latest", "version-00000020", "version-00000030"]


def test_as_many_stay_as_asked_for(tmp_path: Path):
    for version in (1, 2, 3, 4):
        save_checkpoint(tmp_path, FakeEngine("abcd"), Cursor(version=version), keep=3)
    assert names_in(tmp_path)[1:] == [f"version-0000000{version}" for version in (2, 3, 4)]


def test_checkpoints_of_a_future_that_was_taken_back_go(tmp_path: Path):
    for version in (10, 40, 20):
        save_checkpoint(tmp_path, FakeEngine("abcd"), Cursor(version=version))
    assert names_in(tmp_path) == ["latest", "version-00000010", "version-00000020"]


def old_then_new(out_dir: Path) -> None:
    save_checkpoint(out_dir, FakeEngine("new!"), CURSOR_2)


def same_version_again(out_dir: Path) -> None:
    save_checkpoint(out_dir, FakeEngine("new!"), CURSOR_1)


def old_one_deleted(out_dir: Path) -> None:
    save_checkpoint(out_dir, FakeEngine("new!"), CURSOR_2, keep=1)


@pytest.mark.parametrize("save_again", [old_then_new, same_version_again, old_one_deleted])
def test_a_run_killed_at_any_write_continues_from_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_again: Callable[[Path], None]
):
    new_cursor = CURSOR_1 if save_again is same_version_again else CURSOR_2
    outcomes = []
    for number in range(1, 100):
        out_dir = tmp_path / str(number)
        save_checkpoint(out_dir, FakeEngine("old!"), CURSOR_1)
        with monkeypatch.context() as patch:
            fail_at(patch, number, Killed())
            try:
                save_again(out_dir)
            except Killed:
                pass
            else:
                break
        outcomes.append(loaded(out_dir))
        assert not [name for name in names_in(out_dir) if name.startswith(".version")]
        save_again(out_dir)
        assert loaded(out_dir) == (new_cursor, "new!")

    assert len(outcomes) >= 12
    assert all(outcome in [(CURSOR_1, "old!"), (new_cursor, "new!")] for outcome in outcomes)
    is_new = [outcome == (new_cursor, "new!") for outcome in outcomes]
    assert is_new == sorted(is_new)  # once it is the new one, it stays the new one
    assert not is_new[0] and is_new[-1]


def test_the_first_checkpoint_killed_at_any_write_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(1, 100):
        out_dir = tmp_path / str(number)
        with monkeypatch.context() as patch:
            fail_at(patch, number, Killed())
            try:
                old_then_new(out_dir)
            except Killed:
                pass
            else:
                break
        assert loaded(out_dir) in [(Cursor(), ""), (CURSOR_2, "new!")]
    assert number > 10


def test_every_file_is_synced_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[str] = []
    sync = checkpoint._sync
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (sync(path), synced.append(str(path))))
    rename = os.rename

    def rename_after_sync(source: Path, target: Path) -> None:
        paths = [source, *source.rglob("*")]
        assert {str(path) for path in paths} <= set(synced)
        rename(source, target)
        synced.append("renamed")

    monkeypatch.setattr(os, "rename", rename_after_sync)
    folder = save_checkpoint(tmp_path, FakeEngine("abcd"), CURSOR_1)
    assert folder is not None
    after = synced[synced.index("renamed") + 1 :]
    root = str(folder.parent)
    assert after == [root, f"{root}/.latest.tmp", root]


def test_a_full_disk_at_any_write_keeps_the_old_checkpoint_and_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for number in range(1, 100):
        out_dir = tmp_path / str(number)
        save_checkpoint(out_dir, FakeEngine("old!"), CURSOR_1)
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, "No space left on device")
            fail_at(patch, number, full, names=lambda name: name.endswith(("written", "synced")))
            saved = save_checkpoint(out_dir, FakeEngine("new!"), CURSOR_2)
        if saved is not None:
            break
        assert "No space left on device" in capsys.readouterr().err
        assert loaded(out_dir)[0] == CURSOR_1
        assert not [path for path in (out_dir / "checkpoints").glob(".version*")]
    assert number >= 10


def test_a_full_disk_is_recognized_behind_torchs_own_errors(tmp_path: Path):
    full = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    engine = FakeEngine("abcd")
    engine.failure = CheckpointException("save", {0: (full, None)})  # type: ignore[arg-type]
    assert save_checkpoint(tmp_path, engine, CURSOR_1) is None
    assert names_in(tmp_path) == []


def test_an_engine_that_cannot_save_for_another_reason_ends_the_run(two_checkpoints: Path):
    engine = FakeEngine("abcd")
    engine.failure = KeyError("layers.0.weight")
    with pytest.raises(CheckpointError, match=r"could not save.*KeyError: 'layers.0.weight'"):
        save_checkpoint(two_checkpoints, engine, Cursor(version=3))
    assert loaded(two_checkpoints) == (CURSOR_2, "new!")
    assert names_in(two_checkpoints) == ["latest", "version-00000001", "version-00000002"]


def test_a_flipped_bit_anywhere_is_detected_and_the_older_checkpoint_taken(
    two_checkpoints: Path, capsys: pytest.CaptureFixture[str]
):
    folder = two_checkpoints / "checkpoints" / "version-00000002"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        size = path.stat().st_size
        for position in {*range(0, size, 7), size - 1}:
            flip(path, position)
            assert loaded(two_checkpoints) == (CURSOR_1, "old!"), (path, position)
            assert path.name in capsys.readouterr().err
            flip(path, position)
    assert loaded(two_checkpoints) == (CURSOR_2, "new!")


def test_a_flipped_bit_in_latest_never_loads_an_older_checkpoint(two_checkpoints: Path):
    latest = two_checkpoints / "checkpoints" / "latest"
    for position in range(latest.stat().st_size):
        flip(latest, position)
        assert loaded(two_checkpoints) == (CURSOR_2, "new!")
        flip(latest, position)
    latest.write_text("version-00000001 " + latest.read_text().split()[1])
    assert loaded(two_checkpoints) == (CURSOR_2, "new!")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.unlink(), "right is missing"),
        (lambda file: file.write_text("!"), "right has 1 bytes, not 2"),
        (lambda file: file.write_text("!w"), "right has the right size but another SHA-256"),
    ],
)
def test_a_damaged_shard_is_named(
    two_checkpoints: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
):
    damage(two_checkpoints / "checkpoints" / "version-00000002" / "engine" / "rank0" / "right")
    assert loaded(two_checkpoints) == (CURSOR_1, "old!")
    assert message in capsys.readouterr().err


def test_a_shard_of_an_older_checkpoint_is_detected(two_checkpoints: Path):
    root = two_checkpoints / "checkpoints"
    shard = Path("engine/rank0/left")
    (root / "version-00000002" / shard).write_bytes(
        (root / "version-00000001" / shard).read_bytes()
    )
    assert loaded(two_checkpoints) == (CURSOR_1, "old!")


def test_a_run_whose_checkpoints_all_are_damaged_does_not_start_from_zero(two_checkpoints: Path):
    for version in (1, 2):
        flip(two_checkpoints / "checkpoints" / f"version-0000000{version}" / "cursor.json")
    with pytest.raises(CheckpointError, match=r"No checkpoint .* is intact"):
        loaded(two_checkpoints)


def test_a_run_whose_only_checkpoint_was_deleted_does_not_start_from_zero(tmp_path: Path):
    folder = save_checkpoint(tmp_path, FakeEngine("abcd"), CURSOR_1)
    assert folder is not None
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"No checkpoint .* is intact"):
        loaded(tmp_path)


def test_a_checkpoint_of_a_newer_arealite_is_refused(
    two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint, "SCHEMA", 2)
    save_checkpoint(two_checkpoints, FakeEngine("next"), Cursor(version=3))
    monkeypatch.setattr(checkpoint, "SCHEMA", 1)
    with pytest.raises(CheckpointError, match=r"schema 2; this arealite knows up to 1\. Upgrade"):
        loaded(two_checkpoints)


def test_an_engine_that_cannot_load_an_intact_checkpoint_ends_the_run(two_checkpoints: Path):
    engine = FakeEngine()
    engine.failure = RuntimeError("size mismatch for lm_head.weight")
    with pytest.raises(CheckpointError, match=r"size mismatch.*made with another model"):
        load_checkpoint(two_checkpoints, engine)


def test_leftovers_of_a_killed_save_are_removed(two_checkpoints: Path):
    leftover = two_checkpoints / "checkpoints" / ".version-00000003.tmp-4711"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    loaded(two_checkpoints)
    assert not leftover.exists()


def test_a_second_run_in_the_same_folder_is_refused_with_the_name_of_the_first(tmp_path: Path):
    who = f"Another run .* process {os.getpid()} on "
    with RunLock(tmp_path), pytest.raises(ConfigError, match=who):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_refused_by_the_lock(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Set out_dir to a folder"):
        RunLock(tmp_path / "file" / "run").__enter__()


def run_that_is_killed_while_saving(out_dir: Path) -> None:
    RunLock(out_dir).__enter__()
    save_checkpoint(out_dir, FakeEngine("old!"), CURSOR_1)

    def exit_when_written(name: str) -> None:
        if name == "manifest.json written":
            os._exit(9)

    checkpoint._write_point = exit_when_written
    save_checkpoint(out_dir, FakeEngine("new!"), CURSOR_2)


def test_a_killed_run_leaves_no_lock_and_its_last_checkpoint(tmp_path: Path):
    command = "import sys, pathlib, tests.test_checkpoint as t; "
    command += "t.run_that_is_killed_while_saving(pathlib.Path(sys.argv[1]))"
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", command, str(tmp_path)], cwd=root, timeout=60)
    assert killed.returncode == 9
    with RunLock(tmp_path):
        assert loaded(tmp_path) == (CURSOR_1, "old!")


def on_every_rank(out_dir: Path) -> dict[str, Any]:
    """Everything that ranks have to agree on; runs on two of them."""
    rank = dist.rank()
    engine = FakeEngine(f"{rank}abc")
    found: dict[str, Any] = {"saved": save_checkpoint(out_dir, engine, CURSOR_1)}
    found["files"] = sorted(
        str(path.relative_to(out_dir / "checkpoints"))
        for path in (out_dir / "checkpoints" / "version-00000001").rglob("*")
        if path.is_file()
    )

    if rank == 1:
        engine.failure = OSError(errno.ENOSPC, "No space left on device")
    found["disk of rank 1 full"] = save_checkpoint(out_dir, engine, CURSOR_2)
    if rank == 1:
        engine.failure = KeyError("lost")
    found["rank 1 failed"] = error_of(lambda: save_checkpoint(out_dir, engine, CURSOR_2))

    engine.failure = None
    engine.state = f"{rank}xyz"
    save_checkpoint(out_dir, engine, CURSOR_2)
    found["loaded"] = loaded(out_dir)
    dist.barrier()
    if rank == 0:
        flip(out_dir / "checkpoints" / "version-00000002" / "engine" / "rank1" / "right")
    dist.barrier()
    found["loaded after damage"] = loaded(out_dir)

    with RunLock(out_dir):
        found["second run"] = error_of(lambda: RunLock(out_dir).__enter__())
    return found


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_two_ranks_agree_on_every_outcome(tmp_path: Path):
    ranks = run_on_two_ranks(on_every_rank, tmp_path)
    for rank, found in enumerate(ranks):
        assert found["saved"] == tmp_path / "checkpoints" / "version-00000001"
        assert [name.removeprefix("version-00000001/") for name in found["files"]] == [
            "cursor.json",
            "engine/rank0/left",
            "engine/rank0/right",
            "engine/rank1/left",
            "engine/rank1/right",
            "manifest.json",
            "manifest.sha256",
        ]
        assert found["disk of rank 1 full"] is None
        assert "CheckpointError" in found["rank 1 failed"]
        assert "(rank 1: KeyError: 'lost')" in found["rank 1 failed"]
        assert found["loaded"] == (CURSOR_2, f"{rank}xyz")
        assert found["loaded after damage"] == (CURSOR_1, f"{rank}abc")
        assert found["second run"].startswith("ConfigError: Another run is in")


def test_a_checkpoint_of_another_number_of_ranks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    describe = checkpoint._Manifest
    monkeypatch.setattr(
        checkpoint, "_Manifest", lambda **fields: describe(**{**fields, "world_size": 4})
    )
    save_checkpoint(tmp_path, FakeEngine("abcd"), CURSOR_1)
    monkeypatch.undo()
    assert loaded(tmp_path) == (CURSOR_1, "abcd")
    assert "version-00000001 was written by 4 ranks" in capsys.readouterr().out
