"""One worker process as its thread in `rewards/pool.py` sees it: start, call, kill."""

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil

from arealite.errors import RewardError
from arealite.rewards import worker

LOAD_TIMEOUT_S = 120.0
"""For a worker to start and import what a function needs; not part of the call's deadline."""
SEND_TIMEOUT_S = 10
KILL_TIMEOUT_S = 1.0
POLL_S = 0.1
MAX_PROCESSES = 256
"""Of one worker; RLIMIT_NPROC would count all of the user's, and does nothing to root."""
MAX_SWEEPS = 5
"""Through all processes of the machine, as long as there is one more to kill."""
OWNER = "AREALITE_REWARD_WORKER"
"""Environment variable that says, in the processes below a worker, which worker it is of; unless
one was started with another environment."""


@dataclass(eq=False, kw_only=True, slots=True)
class Call:
    """One call on its way through queue, thread and worker."""

    name: str
    file: str  # that defines the function
    function: bytes
    digest: bytes  # of the function
    arguments: bytes
    where: str
    timeout_s: float
    outcome: Future[float] = field(default_factory=Future)
    worker: "WorkerProcess | None" = None
    is_abandoned: bool = False


class CallStoppedError(Exception):
    """A worker did not answer in time, or went too far; its text continues "Reward x ..."."""


class WorkerLostError(Exception):
    """A worker died or cannot be used any more; its text, if any, continues "its worker ..."."""


class WorkerProcess:
    """One worker process at a time. Only its thread calls anything but kill()."""

    def __init__(self, memory_bytes: int | None, lock: threading.Lock) -> None:
        self.loaded: set[bytes] = set()
        self._memory_bytes = memory_bytes
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._mark = ""  # value of OWNER

    def start(self) -> None:
        """Start the process unless there is one. Call with the lock held.

        A plain child of its own instead of multiprocessing's spawn or forkserver: those import the
        `__main__` of the run into every worker, which is the whole recipe with torch, and runs it
        again if it has no guard. Nothing is lost, as cloudpickle sends what `__main__` defines by
        value. A session of its own keeps Ctrl-C and signals to the run's process group away.
        """
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            # The one wait without select: a worker that stopped reading must not block forever.
            limit = struct.pack("ll", SEND_TIMEOUT_S, 0)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._connection = Connection(ours.detach())
            numbers = (theirs.fileno(), os.getpid(), self._memory_bytes or 0)
            self._mark = uuid.uuid4().hex
            marks = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", OWNER: self._mark}
            # -P: without it this folder comes first on sys.path, and our math.py before Python's.
            self._process = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | marks,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def run(self, call: Call) -> float:
        """The function's value; RewardError if it failed in an orderly way."""
        if call.digest not in self.loaded:
            path = [entry or os.getcwd() for entry in sys.path]
            message = pickle.dumps(("load", call.digest, call.function, path, call.file))
            label, problem = self._ask(message, LOAD_TIMEOUT_S, " to be loaded")
            if label != "loaded":
                raise RewardError(f"Reward {call.name} cannot be loaded in a worker: {problem}")
            self.loaded.add(call.digest)
        message = pickle.dumps(("call", call.digest, call.arguments))
        label, value = self._ask(message, call.timeout_s)
        if label == "value":
            return value
        if label == "memory":
            limit = f"{(self._memory_bytes or 0) / 2**30:g} GiB"
            raise WorkerLostError(f"ran out of memory (memory_bytes is {limit}; {value})")
        raise RewardError(f"Reward {call.name} {value}")

    def kill(self) -> None:
        """End the process and its group, at once. Call with the lock held, in any thread."""
        if self._process is not None:
            for kill in (os.killpg, os.kill):  # itself too: a reward may have left its group
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(self._process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Kill and forget the process and all it started; says how it ended, by this or before."""
        with self._lock:
            self.kill()
            process, self._process = self._process, None
        if process is None or self._connection is None:
            return "is gone"
        kill_marked(self._mark)
        self._connection.close()
        self.loaded.clear()
        try:
            code = process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # it waits in the kernel, for a network disk perhaps
            return "does not end although it was killed"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _ask(self, message: bytes, timeout_s: float, to_do: str = "") -> tuple[str, Any]:
        assert self._connection is not None and self._process is not None
        deadline = time.monotonic() + timeout_s
        try:
            self._connection.send_bytes(message)
            # In slices, as the socket alone does not tell: a process that the reward forked may
            # keep the other end open after the worker is dead.
            while not self._connection.poll(min(POLL_S, max(0.0, deadline - time.monotonic()))):
                if self._has_ended():
                    raise WorkerLostError
                if size_of_group(self._process.pid) > MAX_PROCESSES:
                    raise CallStoppedError(f"started more than {MAX_PROCESSES} processes")
                if time.monotonic() >= deadline:
                    limit = f"{timeout_s:g} s{to_do} (reward_timeout_s)"
                    raise CallStoppedError(f"took longer than {limit}")
            return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError, ValueError) as error:  # ValueError: no JSON
            raise WorkerLostError from error

    def _has_ended(self) -> bool:
        # WNOWAIT leaves the zombie, so that its number stays ours until end() has killed the group.
        assert self._process is not None
        try:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, options) is not None
        except ChildProcessError:
            return True


def kill_marked(mark: str) -> None:
    """Kill what a reward has started in sessions of its own, wherever it hangs in the tree."""
    for _ in range(MAX_SWEEPS):
        has_found = False
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(OWNER) == mark:
                    process.kill()
                    has_found = True
        if not has_found:
            return


def size_of_group(group: int) -> int:
    """Processes in this process group."""
    size = 0
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            size += os.getpgid(pid) == group
    return size
