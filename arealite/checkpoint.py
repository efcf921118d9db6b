"""The state of a run on disk: complete and verified, or not there at all.

    with RunLock(cfg.out_dir):                               # one run per folder
        start = load_checkpoint(cfg.out_dir, train_engine)   # Cursor() for a new run
        ...
        save_checkpoint(cfg.out_dir, train_engine, rollouts.cursor(version + 1))

    out_dir/
      lock                       who runs here
      checkpoints/
        latest                   "version-00000040 <digest of its manifest>", replaced last
        version-00000020/        the one before, in case that one is damaged
        version-00000040/
          engine/                whatever TrainEngine.save wrote
          cursor.json            place in the rows
          manifest.json          schema, world size, and size and SHA-256 of each file above
          manifest.sha256        `sha256sum -c manifest.sha256` agrees

A checkpoint is written into a hidden folder, synced, renamed, and only then named by `latest`, so
a kill at any point leaves the previous one or the new one. `out_dir` has to be one folder that
every rank sees: each of them writes its part, and hashes its share of the files.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch.distributed.checkpoint.api import CheckpointException

from arealite import dist
from arealite.api import TrainEngine
from arealite.errors import ArealiteError, CheckpointError, ConfigError
from arealite.types import Cursor

SCHEMA = 1
"""Of the layout above; a checkpoint with a greater one is refused."""

_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileRecord:
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Manifest:
    schema: int
    version: int
    world_size: int
    torch_version: str
    files: dict[str, _FileRecord]


class _Schema(msgspec.Struct):
    """The one field that every manifest has, whatever its schema."""

    schema: int


class _StorageError(CheckpointError):
    """The disk, not the program, is why a checkpoint could not be written."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """A policy and its critic, which are saved and loaded together."""

    policy: TrainEngine
    critic: TrainEngine

    def save(self, path: str | Path) -> None:
        for name in ("policy", "critic"):
            getattr(self, name).save(Path(path) / name)

    def load(self, path: str | Path) -> None:
        for name in ("policy", "critic"):
            getattr(self, name).load(Path(path) / name)


def save_checkpoint(
    out_dir: str | Path, train_engine: TrainEngine | Engines, cursor: Cursor, *, keep: int = 2
) -> Path | None:
    """Write the engine's state and the cursor; returns the folder, or None if the disk is full.

    A collective of all ranks. A disk that is full or fails must not end the training: it prints a
    warning, removes what it had written, and leaves the previous checkpoint as it was.

    Args:
        keep: newest checkpoints that stay; the disk holds one more while saving. Those of later
            versions go: they are from before the run was taken back to an earlier one.

    Raises:
        CheckpointError: the engine failed for another reason than the disk; on every rank.
    """
    root = Path(out_dir) / "checkpoints"
    final = root / _folder_name(cursor.version)
    partial = root / f".{final.name}.tmp-{dist.broadcast(os.getpid())}"
    try:
        _write_files(partial, train_engine, cursor)
        manifest = _describe(partial, cursor.version)
        with _all_ranks_or_none(f"{final} could not be written"):
            if dist.rank() == 0:
                _commit(partial, final, manifest)
    except CheckpointError as error:
        if dist.rank() == 0:
            _sweep(root)
        if not isinstance(error, _StorageError):
            raise
        _warn(f"{error} Training continues without this checkpoint; free some space on that disk.")
        return None
    if dist.rank() == 0:
        _prune(root, newest=cursor.version, keep=keep)
    return final


def load_checkpoint(out_dir: str | Path, train_engine: TrainEngine | Engines) -> Cursor:
    """Restore the engine from the latest intact checkpoint; returns its cursor.

    A collective of all ranks. Without any checkpoint it returns Cursor() and leaves the engine
    alone. One that is damaged is named in a warning, and the newest other one is tried.

    Raises:
        CheckpointError: every checkpoint is damaged, the schema is newer than this arealite, or
            the engine cannot load it; on every rank.
    """
    root = Path(out_dir) / "checkpoints"
    names: list[str] = []
    with _all_ranks_or_none(f"{root} could not be read"):
        if dist.rank() == 0 and root.is_dir():
            _sweep(root)
            names = _candidates(root)
    names = dist.broadcast(names)
    for name in names:
        damage = _find_damage(root / name)
        if damage is None:
            return _restore(root / name, train_engine)
        _warn(f"{damage}. That checkpoint is left out.")
    if names:
        raise CheckpointError(
            f"No checkpoint in {root} is intact (the warnings above name the files). Restore one "
            f"from a copy, or delete {root} to start from the beginning."
        )
    return Cursor()


def latest_version(out_dir: str | Path) -> int:
    """Training steps that the newest checkpoint of this folder has behind it; 0 without any.

    A collective of all ranks.
    """
    versions = _versions(Path(out_dir) / "checkpoints") if dist.rank() == 0 else []
    return dist.broadcast(max(versions, default=0))


class RunLock:
    """Keeps a second run out of the folder; the kernel releases it when this process ends.

        with RunLock(cfg.out_dir):
            ...

    A collective of all ranks, of which rank 0 holds the lock.

    Raises:
        ConfigError: another run is in this folder (the message says who), or it is not writable.
    """

    def __init__(self, out_dir: str | Path) -> None:
        self.path = Path(out_dir) / ".lock"
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        problem = dist.broadcast(self._acquire() if dist.rank() == 0 else None)
        if problem is not None:
            raise ConfigError(problem)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _acquire(self) -> str | None:
        """Take the lock and write down who has it; returns what is wrong."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            return (
                f"{self.path} cannot be written ({error.strerror}). "
                "Set out_dir to a folder that you may write to, on a disk with free space."
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1024).decode(errors="replace").strip()
            os.close(descriptor)
            return (
                f"Another run is in {self.path.parent}: {holder or 'it has not said who'}. "
                "End that one, or set out_dir to another folder."
            )
        except OSError as error:  # some network file systems have no locks
            _warn(f"{self.path} cannot be locked ({error.strerror}). Start no second run here.")
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name, too
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{_who()}\n".encode())
        return None


def _write_files(partial: Path, train_engine: TrainEngine | Engines, cursor: Cursor) -> None:
    with _all_ranks_or_none(f"{partial} could not be made"):
        if dist.rank() == 0:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _sweep(partial.parent)
            (partial / "engine").mkdir(parents=True)
    with _all_ranks_or_none("The training engine could not save its state"):
        _write_point("before the engine saves")
        train_engine.save(partial / "engine")
        _write_point("after the engine saved")
    with _all_ranks_or_none(f"{partial}/cursor.json could not be written"):
        if dist.rank() == 0:
            (partial / "cursor.json").write_bytes(msgspec.json.encode(cursor))
            _write_point("cursor.json written")


def _describe(partial: Path, version: int) -> _Manifest:
    """Sync and hash all files, each rank its share."""
    names: list[str] = []
    with _all_ranks_or_none(f"{partial} could not be listed"):
        if dist.rank() == 0:
            names = sorted(
                str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()
            )
    share: dict[str, _FileRecord] = {}
    with _all_ranks_or_none(f"The files in {partial} could not be synced"):
        for name in dist.shard(dist.broadcast(names)):
            _sync(partial / name)
            share[name] = _record(partial / name)
        _write_point("files synced")
    return _Manifest(
        schema=SCHEMA,
        version=version,
        world_size=dist.world_size(),
        torch_version=str(torch.__version__),
        files={name: record for part in dist.gather(share) for name, record in part.items()},
    )


def _commit(partial: Path, final: Path, manifest: _Manifest) -> None:
    """Seal the hidden folder, give it its name, and point `latest` to it."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    digest = hashlib.sha256(text).hexdigest()
    _write_synced(partial / "manifest.json", text)
    _write_synced(partial / "manifest.sha256", f"{digest}  manifest.json\n".encode())
    for folder in {path.parent for path in partial.rglob("*")}:
        _sync(folder)
    _write_point("folder synced")
    if final.exists():  # a rerun of the same step; _sweep puts it back if we die before the rename
        os.rename(final, final.with_name(f".{final.name}.replaced"))
        _write_point("previous one of this version set aside")
    os.rename(partial, final)
    _sync(final.parent)
    _write_point("renamed")
    _write_synced(final.parent / ".latest.tmp", f"{final.name} {digest}\n".encode())
    os.replace(final.parent / ".latest.tmp", final.parent / "latest")
    _sync(final.parent)
    _write_point("latest replaced")


def _prune(root: Path, *, newest: int, keep: int) -> None:
    versions = _versions(root)
    kept = [version for version in versions if version <= newest][: max(keep, 1)]
    for version in versions:
        if version not in kept:
            # Renamed first: a folder with a name is complete, also when we die while deleting.
            folder = root / _folder_name(version)
            with contextlib.suppress(OSError):
                os.rename(folder, folder.with_name(f".{folder.name}.tmp-deleted"))
            _write_point("old one set aside")
    _sweep(root)


def _sweep(root: Path) -> None:
    """Clean up after a save that did not end: hidden folders go or get their name back."""
    for replaced in root.glob(".version-*.replaced"):
        final = root / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.rename(replaced, final)
    for partial in root.glob(".version-*.tmp-*"):
        shutil.rmtree(partial, ignore_errors=True)
        _write_point("leftover removed")


def _candidates(root: Path) -> list[str]:
    """Names of the checkpoints in the order to try: the one of `latest`, then newest first."""
    names = [_folder_name(version) for version in _versions(root)]
    latest = root / "latest"
    if not latest.exists():  # killed before the first one was done, or `latest` was deleted
        return names
    name, _, digest = _read(latest).decode(errors="replace").strip().partition(" ")
    if name not in names:
        _warn(f"{latest} names {name!r}, which is not there. The newest intact one is taken.")
        return names or [name]
    if _read(root / name / "manifest.sha256").partition(b" ")[0] != digest.encode():
        _warn(f"{latest} does not fit {name}/manifest.sha256. The newest intact one is taken.")
        return names
    return [name, *(other for other in names if other != name)]


def _find_damage(folder: Path) -> str | None:
    """Which file of a checkpoint is not what was written, or None; each rank checks its share."""
    manifest: _Manifest | None = None
    with _all_ranks_or_none(f"{folder}/manifest.json could not be understood"):
        if dist.rank() == 0:
            manifest = _intact_manifest(folder)
    manifest = dist.broadcast(manifest)
    if manifest is None:
        return f"{folder}/manifest.json or manifest.sha256 is missing or was changed"
    files = manifest.files
    damages = [_compare(folder / name, files[name]) for name in dist.shard(sorted(files))]
    found = [damage for part in dist.gather(damages) for damage in part if damage is not None]
    return found[0] if found else None


def _intact_manifest(folder: Path) -> _Manifest | None:
    """The manifest if it is what was written; raises if only a newer arealite can tell."""
    text = _read(folder / "manifest.json")
    expected = f"{hashlib.sha256(text).hexdigest()}  manifest.json\n".encode()
    if not text or _read(folder / "manifest.sha256") != expected:
        return None
    schema = msgspec.json.decode(text, type=_Schema).schema
    if schema > SCHEMA:
        raise CheckpointError(
            f"{folder} has checkpoint schema {schema}; this arealite knows up to {SCHEMA}. Upgrade "
            "arealite, or set out_dir to a new folder."
        )
    return msgspec.json.decode(text, type=_Manifest)


def _restore(folder: Path, train_engine: TrainEngine | Engines) -> Cursor:
    with _all_ranks_or_none(
        f"The training engine could not load {folder}",
        advice=" The files are intact: was it made with another model or another arealite? "
        "Set those back, or set out_dir to a new folder.",
    ):
        manifest = msgspec.json.decode(_read(folder / "manifest.json"), type=_Manifest)
        cursor = msgspec.json.decode(_read(folder / "cursor.json"), type=Cursor)
        train_engine.load(folder / "engine")
    if manifest.world_size != dist.world_size() and dist.rank() == 0:
        print(
            f"{folder.name} was written by {manifest.world_size} ranks and is continued by "
            f"{dist.world_size()}.",
            flush=True,
        )
    return cursor


@contextlib.contextmanager
def _all_ranks_or_none(action: str, advice: str = "") -> Iterator[None]:
    """Run the body on this rank; afterwards every rank raises if any rank did.

    Without it a rank that fails alone would leave the others waiting in their next collective.
    """
    failure: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        failure = error
    failures = dist.gather(None if failure is None else (_text(failure), _is_storage(failure)))
    found = [(rank, *each) for rank, each in enumerate(failures) if each is not None]
    if not found:
        return
    is_storage = any(each[-1] for each in found)  # all ranks have to agree on what follows
    if isinstance(failure, ArealiteError) and not is_storage:
        raise failure
    where = f"rank {found[0][0]}: " if dist.world_size() > 1 else ""
    kind = _StorageError if is_storage else CheckpointError
    raise kind(f"{action} ({where}{found[0][1]}).{advice}") from failure


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # The last line: torch's CheckpointException puts a traceback before the message.
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _is_storage(error: BaseException | None) -> bool:
    """Whether a disk is to blame: such an OSError in the chain, or what became of one."""
    if error is None:
        return False
    # Writers in C++ and Rust raise their own errors: torch's zip writer, safetensors.
    signs = (os.strerror(errno.ENOSPC), "inline_container", "iostream error")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return True
    if any(sign in str(error) for sign in signs):
        return True
    inner = [pair[0] for pair in getattr(error, "failures", {}).values()]
    return any(_is_storage(cause) for cause in [*inner, error.__cause__ or error.__context__])


def _compare(path: Path, record: _FileRecord) -> str | None:
    """How a file differs from its record, or None."""
    try:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != record.size_bytes:
            return f"{path} has {path.stat().st_size} bytes, not {record.size_bytes}"
        if _record(path) != record:
            return f"{path} has the right size but another SHA-256: its content changed"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def _record(path: Path) -> _FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _FileRecord(size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def _versions(root: Path) -> list[int]:
    """Versions that have a folder, newest first."""
    suffixes = [path.name.removeprefix("version-") for path in root.glob("version-*")]
    versions = [int(suffix) for suffix in suffixes if suffix.isdecimal() and len(suffix) >= 8]
    return sorted(versions, reverse=True)


def _folder_name(version: int) -> str:
    return f"version-{version:08d}"


def _read(path: Path) -> bytes:
    """The content of a small file; nothing if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _write_point(f"{path.name} written")
    _sync(path)


def _sync(path: Path) -> None:
    """Make a file or folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_point(name: str) -> None:
    """Called after each write; tests replace it to die there."""


def _who() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else "unknown"
    return f"process {os.getpid()} on {socket.gethostname()} (boot {boot})"


def _warn(text: str) -> None:
    if dist.rank() == 0:
        print(f"arealite warning: {text}", file=sys.stderr, flush=True)
