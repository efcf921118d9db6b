"""Runs Python that nobody has read, such as what a model has written, and says how it ended.

    result = run_python("print(int(input()) * 2)", stdin="21")     # from any thread
    result = await arun_python(code)                                # on an event loop

A program gets Python's standard library and an empty folder, for as long and as much as
`SandboxLimits` say; no network, no other process, no environment. See docs/sandbox.md for what
protects on which machine.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import marshal
import math
import os
import py_compile
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from arealite.errors import ConfigError
from arealite.rewards.sandbox import confine

Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]
"""ok: ended by itself with 0; error: with an exception or another code; timeout, output: too long,
too much; memory: asked for more than it may have; killed: by a signal."""

TESTS_LACK_A_MODULE = 98
"""Exit code of tests that import what the sandbox does not have; the same in `child.py`."""
FIRST_USER, NUM_USERS = 50_000, 10_000
"""Users that programs run as under root: each at a time another one."""
NUM_FILES, NUM_THREADS = 64, 64
"""That a program may have open, and running."""
SLICE_S = 0.1
CHUNK_BYTES = 65_536
KILL_TIMEOUT_S = 5.0
TRY_TIMEOUT_S = 30.0
HERE = Path(__file__).parent
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import child; child.main(*map(int, sys.argv[2:]))"
)
"""Imported, it is not compiled anew for each program, which would take a third of the time."""
FOLDER = "/sandbox"
"""Where a program is, as it sees it, under bubblewrap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """What one program may take."""

    timeout_s: float = 6.0
    """Seconds on the clock; as many of processor time."""
    memory_bytes: int = 512 * 2**20
    """Address space. Python alone takes about 30 MB of it, each thread 8 MB."""
    output_bytes: int = 2**20
    """Of stdout, and of stderr; a program that writes more is ended."""
    file_bytes: int = 16 * 2**20
    """Of each file in its folder; of all together under bubblewrap."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"SandboxLimits.{name}={getattr(self, name)} must be above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxResult:
    """How a program ended, and what it said."""

    status: Status
    stdout: str
    stderr: str
    exit_code: int | None  # None: it was ended from outside
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Protections:
    """What holds a program on this machine; docs/sandbox.md says what each of them is worth."""

    bubblewrap: bool  # namespaces: sees no other process, no network, no file of this machine
    seccomp: bool  # no sockets, signals, processes or tracing
    landlock: bool  # no files but its own folder and Python's library
    user: bool  # runs as a user that nothing belongs to

    @property
    def gaps(self) -> list[str]:
        """What a program could do in spite of all; empty if nothing is known."""
        sees_files = not (self.bubblewrap or self.landlock)
        gaps = {
            "open sockets": not (self.bubblewrap or self.seccomp),
            "start processes that outlive it": not (self.bubblewrap or self.seccomp),
            "signal processes of this user": not (self.bubblewrap or self.seccomp or self.user),
            "read and write files that this user may": sees_files and not self.user,
            "read and write files that everybody may": sees_files and self.user,
        }
        return [gap for gap, is_open in gaps.items() if is_open]


def run_python(code: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> SandboxResult:
    """Run a program to its end, or to the end of its limits."""
    return run_child({"mode": "program", "code": code}, {}, stdin=stdin, limits=limits)


async def arun_python(
    code: str, *, stdin: str = "", limits: SandboxLimits | None = None
) -> SandboxResult:
    """`run_python` beside an event loop; as many at a time as there are cores, the rest wait."""
    run = functools.partial(run_python, code, stdin=stdin, limits=limits)
    return await asyncio.get_running_loop().run_in_executor(workers(), run)


@functools.cache
def workers() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that wait for programs: one for each core."""
    return concurrent.futures.ThreadPoolExecutor(num_workers(), thread_name_prefix="sandbox")


def num_workers() -> int:
    """Programs that are worth running at a time: one for each core."""
    return len(os.sched_getaffinity(0))


def run_child(
    settings: dict[str, Any],
    secret: dict[str, Any],
    *,
    stdin: str = "",
    limits: SandboxLimits | None = None,
    machine: Protections | None = None,
) -> SandboxResult:
    """Run a program in one of the modes of `child.py`.

    Args:
        settings: `mode` and `code`.
        secret: what the mode needs besides, and the program shall not see.
        machine: what has to hold the program; None: all that this machine has.

    Raises:
        ConfigError: the program could not be held as it should.
    """
    limits, machine = limits or SandboxLimits(), machine or protections()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder())
        user = FIRST_USER + secrets.randbelow(NUM_USERS) if machine.user else 0
        if user:
            os.chown(folder, user, user)
        settings = settings | {
            "user": user,
            "limits": _of_kernel(limits, machine),
            "promised": {"landlock": machine.landlock, "seccomp": machine.seccomp},
        }
        told = [stack.enter_context(_file_with(marshal.dumps(each))) for each in (settings, secret)]
        descriptors = [file.fileno() for file in told]
        process = subprocess.Popen(
            [*_command(limits, machine), *map(str, descriptors)],
            stdin=stack.enter_context(_file_with(stdin.encode("utf-8", "surrogatepass"))),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            result = _follow(process, limits)
        finally:
            _end(process)
    if result.exit_code == confine.NOT_CONFINED:
        raise ConfigError(f"The sandbox could not hold a program: {result.stderr[-200:]}.")
    return result


def _follow(process: subprocess.Popen[bytes], limits: SandboxLimits) -> SandboxResult:
    """Read what a program says until it ends, is out of time, or has said too much."""
    assert process.stdout is not None and process.stderr is not None
    said = {process.stdout: bytearray(), process.stderr: bytearray()}
    began_s = time.monotonic()
    ended: Status | None = None
    with selectors.DefaultSelector() as selector:
        for stream in said:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and ended is None:
            left_s = began_s + limits.timeout_s - time.monotonic()
            if left_s <= 0:
                ended = "timeout"
            for key, _ in selector.select(min(SLICE_S, max(0.0, left_s))):
                stream: Any = key.fileobj
                if chunk := os.read(stream.fileno(), CHUNK_BYTES):
                    said[stream] += chunk
                else:
                    selector.unregister(stream)
            if max(map(len, said.values())) > limits.output_bytes:
                ended = "output"
    if ended is None:
        ended = _wait(process, began_s + limits.timeout_s)
    stdout, stderr = (
        bytes(text[: limits.output_bytes]).decode("utf-8", "replace") for text in said.values()
    )
    return SandboxResult(
        status=ended or _status(process.returncode, stderr),
        stdout=stdout,
        stderr=stderr,
        exit_code=process.returncode,
        seconds=time.monotonic() - began_s,
    )


def _wait(process: subprocess.Popen[bytes], until_s: float) -> Status | None:
    """Wait for a program that has closed its output."""
    try:
        process.wait(max(0.0, until_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timeout"
    return None


def _status(code: int, stderr: str) -> Status:
    if code == 0:
        return "ok"
    last_line = stderr.rstrip().rpartition("\n")[2]
    if last_line.startswith("MemoryError"):
        return "memory"
    # bwrap answers 128 and the signal for a program that a signal has ended.
    number = -code if code < 0 else code - 128
    if number == signal.SIGXCPU:
        return "timeout"
    return "killed" if number > 0 else "error"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and all that it could have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_TIMEOUT_S)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


# --- What this machine has ------------------------------------------------------------------------


@functools.cache
def protections() -> Protections:
    """What holds programs here, found out by trying.

    Raises:
        ConfigError: not even a program that does nothing can be run.
    """
    with contextlib.suppress(OSError):  # others may own this folder; then it is compiled there
        py_compile.compile(str(HERE / "child.py"), quiet=1)
    for machine in _candidates():
        if _holds(machine):
            return machine
    raise ConfigError(f"No program can be run in a sandbox with {_python()}.")


def _candidates() -> Iterator[Protections]:
    """What may hold programs here, the best first."""
    has_bubblewrap = shutil.which("bwrap") is not None
    is_root = os.getuid() == 0 and _is_open_to_all(_python())
    for bubblewrap in [True, False] if has_bubblewrap else [False]:
        for user in [True, False] if is_root and not bubblewrap else [False]:
            for seccomp, landlock in itertools.product([True, False], repeat=2):
                yield Protections(
                    bubblewrap=bubblewrap, seccomp=seccomp, landlock=landlock, user=user
                )


def _holds(machine: Protections) -> bool:
    limits = SandboxLimits(timeout_s=TRY_TIMEOUT_S)
    try:
        program = {"mode": "program", "code": "print(1)"}
        return run_child(program, {}, limits=limits, machine=machine).stdout == "1\n"
    except (OSError, ConfigError):
        return False


@functools.cache
def _python() -> str:
    """A Python for programs: this one, or the system's if only root can reach this one."""
    own = os.path.realpath(sys.executable)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    system = shutil.which(version, path="/usr/bin:/usr/local/bin")
    if system is None or os.getuid() != 0 or _is_open_to_all(own):
        return own
    return os.path.realpath(system)


def _is_open_to_all(path: str) -> bool:
    """Whether every user may reach and read this file."""
    modes = [os.stat(folder).st_mode for folder in Path(path).parents]
    return all(mode & stat.S_IXOTH for mode in modes) and bool(os.stat(path).st_mode & stat.S_IROTH)


# --- How a program is started ---------------------------------------------------------------------


def _command(limits: SandboxLimits, machine: Protections) -> list[str]:
    """What starts `child.py`; two descriptors to read from come behind it."""
    wrapper = _bubblewrap(limits) if machine.bubblewrap else []
    return [*wrapper, _python(), "-I", "-S", "-X", "utf8", "-c", START, str(HERE)]


def _bubblewrap(limits: SandboxLimits) -> list[str]:
    """bwrap with nothing to see but Python, this package, and an empty folder in memory."""
    seen = [*confine.READABLE, str(Path(_python()).parents[1]), str(HERE)]
    binds = [part for path in seen for part in ("--ro-bind-try", path, path)]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--clearenv"),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
        *binds,
        *("--dev", "/dev", "--size", str(limits.file_bytes), "--tmpfs", FOLDER),
        *("--remount-ro", "/", "--remount-ro", "/dev", "--chdir", FOLDER),
    ]


def _of_kernel(limits: SandboxLimits, machine: Protections) -> dict[str, int]:
    return {
        "cpu_s": math.ceil(limits.timeout_s),
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "num_files": NUM_FILES,
        # The kernel counts all threads of a user, so that of a trainer has hundreds already.
        "num_threads": NUM_THREADS if machine.user else 0,
    }


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A new folder, which is gone afterwards, whatever a program has made in it."""
    folder = tempfile.mkdtemp(prefix="arealite-sandbox-")
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # forbidden to its owner, or too deep for Python
            subprocess.run(["chmod", "-R", "u+rwX", folder], capture_output=True, check=False)
            subprocess.run(["rm", "-rf", folder], capture_output=True, check=False)


@contextlib.contextmanager
def _file_with(content: bytes) -> Iterator[IO[bytes]]:
    """A file without a name, to be read from its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file
