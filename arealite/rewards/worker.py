"""The process in which reward functions run: reads calls from its parent and answers each one.

`rewards/pool.py` starts this file by its path, so that it has a `__main__` of its own and imports
nothing of the run but what a reward function itself needs. Keep it that way: torch alone would
cost every worker seconds and hundreds of megabytes.

    parent -> worker   pickled ("load", digest, function, sys.path, file of the function)
                       or ("call", digest, arguments)
    worker -> parent   JSON    ["loaded", null], ["value", 1.0], ["failed", text], ["memory", text]
"""

import contextlib
import ctypes
import json
import math
import numbers
import os
import pickle
import reprlib
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NUM_FRAMES = 2
DYNAMIC = "<dynamic-code>"
"""What cloudpickle 3.1.3 calls the file of a function that it sends by value."""
Loaded = tuple[Callable[..., object], str]
"""A function, and the file that defines it."""


class NotANumberError(Exception):
    """A reward function returned something that cannot be a reward."""


def as_reward(value: object) -> float:
    """The value as a finite float; NotANumberError says what it is instead.

    Every Python and numpy number will do, and True and False. A tensor will not, even with a
    single element: nothing tells that one was meant.
    """
    # numpy registers its integers and floats as Real, but not its bool.
    if isinstance(value, numbers.Real) or type(value).__name__ in ("bool", "bool_"):
        with contextlib.suppress(OverflowError):
            number = float(value)  # type: ignore[arg-type]
            if math.isfinite(number):
                return number
    try:
        shown = reprlib.repr(value)
    except Exception:
        shown = "an object without a repr"
    if type(value).__name__ == "coroutine":
        value.close()  # type: ignore[attr-defined]
        shown += "; define the function with `async def`"
    raise NotANumberError(
        f"returned {type(value).__name__} {shown}, which is not a finite int or float"
    )


def describe(error: BaseException, file: str = "") -> str:
    """Type and message of an exception, and the last lines of the user's code that it passed.

    Args:
        file: where a function that was sent by value was defined.
    """
    what = "".join(traceback.format_exception_only(error)).strip()
    where = "".join(traceback.format_list(_frames_of_user(error.__traceback__, file)))
    return f"raised {what[:2_000]}\n{where}".rstrip()


def _frames_of_user(trace: TracebackType | None, file: str) -> list[traceback.FrameSummary]:
    ours = os.path.dirname(__file__)
    frames = [
        traceback.FrameSummary(file, frame.lineno, frame.name)
        if file and frame.filename == DYNAMIC
        else frame
        for frame in traceback.extract_tb(trace)
        if frame.filename not in (__file__, os.path.join(ours, "pool.py"))
    ]
    return frames[-NUM_FRAMES:]


def main(socket: int, parent: int, memory_bytes: int) -> None:
    """Answer calls until the parent closes its end of the socket."""
    _confine(parent, memory_bytes)
    connection = Connection(socket)
    functions: dict[bytes, Loaded] = {}
    pid = os.getpid()
    with contextlib.suppress(EOFError, OSError):
        while True:
            answer = _answer(connection.recv_bytes(), functions)
            if os.getpid() != pid:
                os._exit(0)  # the reward forked, and this is the child: only its parent may answer
            connection.send_bytes(json.dumps(answer).encode())


def _answer(message: bytes, functions: dict[bytes, Loaded]) -> tuple[str, float | str | None]:
    file = ""
    try:
        match pickle.loads(message):
            case ("load", digest, function, path, file):
                sys.path[:] = path
                functions[digest] = pickle.loads(function), file
                return "loaded", None
            case (_, digest, arguments):
                function, file = functions[digest]
                return "value", as_reward(function(*pickle.loads(arguments)))
            case other:
                raise AssertionError(other)
    except NotANumberError as error:
        return "failed", str(error)
    except MemoryError as error:
        return "memory", describe(error, file)
    except BaseException as error:  # sys.exit() and KeyboardInterrupt end the call, not the worker
        return "failed", describe(error, file)


def _confine(parent: int, memory_bytes: int) -> None:
    """Make sure that whatever runs here hurts only itself, and does not outlive the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        # Not RLIMIT_AS: it counts mapped libraries too, and torch with CUDA maps gigabytes of them.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # short of memory, the kernel shall take a worker and not the trainer
    # What a reward prints is seen, but never in the midst of the run's own output.
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
        sys.stdout = sys.stderr


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
