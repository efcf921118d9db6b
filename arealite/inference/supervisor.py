"""The process that owns the servers of a run, and outlives whatever may kill the run.

    run ──stdin──> supervisor ──> server 0, server 1, ... each with its engine and workers
        <─stdout─  one JSON event per line: started, ready, died, failed

Each server has a thread that starts it, watches it, and starts it again when it dies or hangs. The
run holds the other end of stdin; when it closes, for whatever reason, everything goes: processes,
ports, shared memory, temporary files. A supervisor that is killed itself takes the servers along,
through the lifeline of `vllm_plugin`.
"""

import contextlib
import ctypes
import http.client
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from arealite.errors import ServerError
from arealite.inference.tokens import TOKEN
from arealite.inference.vllm_plugin import LIFELINE

SHM = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36
OWNER = "AREALITE_SERVER"
"""Environment variable that says, in every process of a server, which server it is of."""
WINDOW_S = 600.0
"""Deaths of a server count against `max_restarts` for so long."""
MAX_BACKOFF_S = 30.0
POLL_S = 0.2
FREEZE_TIMEOUT_S = 2.0
TRACKER_TIMEOUT_S = 5.0


@dataclass
class Spec:
    """What to start; the run sends it as the first line on stdin."""

    commands: list[list[str]]
    """Command line of each server, with `{port}` where its port belongs."""
    environments: list[dict[str, str]]
    """Per server, variables on top of the run's own."""
    log_dir: str
    startup_timeout_s: float
    host: str = "127.0.0.1"
    """Where the servers listen."""
    hang_timeout_s: float = 15.0
    """Silence of a server's engine after which it is killed and started again."""
    max_restarts: int = 5
    """Within `WINDOW_S`; a server that dies once more ends the run."""


class ClosedError(Exception):
    """Time to clean up: the run closed its end of the pipe, or another server has failed."""


@dataclass
class Server:
    """One vLLM API server and everything below it, started as often as it takes."""

    index: int
    spec: Spec
    scratch: Path
    closing: threading.Event
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    segments: set[Path] = field(default_factory=set)
    deaths_s: list[float] = field(default_factory=list)

    @property
    def address(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.spec.host, self.spec.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}"

    @property
    def log(self) -> Path:
        return Path(self.spec.log_dir) / f"server-{self.index}.log"

    def tend(self, is_ready: threading.Event) -> None:
        """Keep the server running until the run ends.

        Raises:
            ServerError: it does not start, or dies again and again.
            ClosedError: it is time to end.
        """
        self._start_on_a_free_port()
        self.segments = mapped_segments(self._family())
        is_ready.set()
        while True:
            reason = self._watch()
            while reason:
                emit({"event": "died", "address": self.address, "message": reason})
                self._end()
                self._wait(self._backoff_s(reason))
                reason = self._start_again()
            self.segments |= mapped_segments(self._family())
            segments = [str(segment) for segment in self.segments]
            emit({"event": "restarted", "address": self.address, "segments": segments})

    def _start_again(self) -> str:
        """Why the server did not start; empty if it did."""
        try:
            self._start()
        except ServerError as error:
            return str(error)
        return ""

    def _start_on_a_free_port(self) -> None:
        """The first start: a port that somebody else took in the meantime is no reason to fail."""
        for attempts_left in (2, 1, 0):
            self.port = _free_port()
            try:
                return self._start()
            except ServerError as error:
                self._end()
                if "ddress already in use" not in str(error) or not attempts_left:
                    raise

    def _start(self) -> None:
        """Start the server and wait until it samples tokens; ServerError if it does not."""
        deadline = time.monotonic() + self.spec.startup_timeout_s
        if owner := _listener(self.port):
            raise ServerError(f"Port {self.port} is taken: Address already in use by {owner}.")
        # The lifeline ends vLLM's grandchildren; its sockets and temporary files go to our scratch.
        environment = os.environ | self.spec.environments[self.index]
        environment |= {
            LIFELINE: str(os.getpid()),
            OWNER: f"{os.getpid()}-{self.index}",
            "VLLM_RPC_BASE_PATH": str(self.scratch),
            "TMPDIR": str(self.scratch),
        }
        with open(self.log, "ab" if self.deaths_s else "wb") as file:
            self.process = subprocess.Popen(
                [part.replace("{port}", str(self.port)) for part in self.spec.commands[self.index]],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        emit({"event": "started", "pid": self.process.pid})
        while not self._samples_tokens():
            if (ending := self._ending()) is not None:
                raise ServerError(f"The vLLM server {ending} {self._log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The server was not ready within {self.spec.startup_timeout_s:.0f} s. Raise "
                    f"server.startup_timeout_s, or see why. {self._log_tail()}"
                )
            self._wait(POLL_S)

    def _watch(self) -> str:
        """Return when the server has died or hangs, with the words for it."""
        heard_s = asked_s = time.monotonic()
        while True:
            self._wait(POLL_S)
            if (ending := self._ending()) is not None:
                return f"The vLLM server {ending} {self._log_tail()}"
            if time.monotonic() - asked_s < 1.0:
                continue
            try:
                # A round trip to the engine; /health is fine also when the engine hangs.
                self._ask("/is_paused", timeout_s=2.0)
                heard_s = time.monotonic()
            except (OSError, http.client.HTTPException) as error:
                if _is_dead(error) and time.monotonic() - heard_s > 2.0:
                    return f"The engine of the vLLM server is dead ({error}). {self._log_tail()}"
                silence_s = time.monotonic() - heard_s
                if silence_s > self.spec.hang_timeout_s - 1.0:
                    return f"The vLLM server did not answer for {silence_s:.0f} s ({error})."
            asked_s = time.monotonic()

    def _backoff_s(self, reason: str) -> float:
        """How long to wait before the next start: longer each time, or ServerError."""
        now_s = time.monotonic()
        self.deaths_s = [death_s for death_s in self.deaths_s if now_s - death_s < WINDOW_S]
        self.deaths_s.append(now_s)
        if len(self.deaths_s) > self.spec.max_restarts:
            raise ServerError(
                f"{self.address} died {len(self.deaths_s)} times within {WINDOW_S / 60:.0f} "
                f"minutes (server.max_restarts={self.spec.max_restarts}), the last time so: "
                f"{reason}"
            )
        return min(MAX_BACKOFF_S, 0.5 * 2 ** (len(self.deaths_s) - 1))

    def _ending(self) -> str | None:
        """How the process has ended; None while it runs."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return None
        return f"was killed by signal {-code}." if code < 0 else f"ended with exit code {code}."

    def _log_tail(self, lines: int = 25) -> str:
        """The end of what the server printed."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
        return f"Its log {self.log} ends:\n" + "\n".join(text.splitlines()[-lines:])

    def _samples_tokens(self) -> bool:
        """Whether the server is ready: `/health` is fine long before it can generate.

        Several requests at once, with log-probs: what vLLM compiles for them on first use takes
        seconds, in which no other request, nor a pause, is heard.
        """
        if not self._generates():
            return False
        with ThreadPoolExecutor(4) as pool:
            return all(pool.map(lambda _: self._generates(), range(4)))

    def _generates(self) -> bool:
        # Eight tokens, because a first prompt of one token has been seen to kill a CPU worker.
        body = {"token_ids": [1] * 8, "sampling_params": {"max_tokens": 4, "logprobs": 0}}
        try:
            reply = self._ask("/inference/v1/generate", body, timeout_s=60)
            return bool(json.loads(reply)["choices"][0]["token_ids"])
        except (OSError, http.client.HTTPException, ValueError, LookupError):
            return False

    def _ask(self, path: str, body: object = None, *, timeout_s: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if token := self.spec.environments[self.index].get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=content, headers=headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return reply.read()

    def _family(self) -> list[psutil.Process]:
        """Every process of this server, also those whose parent is gone: they are ours now."""
        owner = f"{os.getpid()}-{self.index}"
        family: list[psutil.Process] = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                # Most stay in the server's session; vLLM's engines overwrite their environment.
                in_session = self.process and os.getsid(process.pid) == self.process.pid
                if in_session or process.environ().get(OWNER) == owner:
                    family.append(process)
        return family

    def _end(self) -> None:
        """End what is left of the server, at once, and unlink the memory it had mapped."""
        self.segments |= end_frozen(self._family())
        if self.process is not None:
            self.process.wait()
        for segment in self.segments:
            segment.unlink(missing_ok=True)
        self.segments = set()

    def _wait(self, seconds: float) -> None:
        if self.closing.wait(seconds):
            raise ClosedError


def main() -> None:
    """Serve one run: start, report, watch, clean up."""
    closing = threading.Event()
    outcomes: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes stdin
    signal.signal(signal.SIGTERM, lambda *_: outcomes.put(None))
    _adopt_orphans()
    scratch = Path(tempfile.mkdtemp(prefix="arealite-"))
    servers: list[Server] = []
    try:
        spec = Spec(**json.loads(sys.stdin.buffer.readline() or b"null"))
        servers = [Server(i, spec, scratch, closing) for i in range(len(spec.commands))]
        ready = [threading.Event() for _ in servers]
        threads = [
            threading.Thread(target=_tend, args=(server, is_ready, outcomes), daemon=True)
            for server, is_ready in zip(servers, ready, strict=True)
        ]
        # Outlives everything but stdin; nothing else may read from it.
        watcher = threading.Thread(target=_until_closed, args=(outcomes,), daemon=True)
        for thread in [watcher, *threads]:
            thread.start()
        threading.Thread(target=_announce, args=(servers, ready), daemon=True).start()
        failure = outcomes.get()
        closing.set()
        if failure is not None:
            emit({"event": "failed", "message": str(failure)})
        for thread in threads:
            thread.join(timeout=5)
    except TypeError:
        pass  # the run was gone before it said what to start
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _clean_up(set().union(*(server.segments for server in servers)))
        shutil.rmtree(scratch, ignore_errors=True)


def _tend(
    server: Server, is_ready: threading.Event, outcomes: "queue.SimpleQueue[Exception | None]"
) -> None:
    try:
        server.tend(is_ready)
    except ClosedError:
        return
    except Exception as error:
        outcomes.put(error)


def _announce(servers: list[Server], ready: list[threading.Event]) -> None:
    """Tell the run where the servers are, once all of them are ready."""
    for is_ready in ready:
        is_ready.wait()
    addresses = [server.address for server in servers]
    segments = [str(segment) for server in servers for segment in server.segments]
    emit({"event": "ready", "addresses": addresses, "segments": segments})


def _until_closed(outcomes: "queue.SimpleQueue[Exception | None]") -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    outcomes.put(None)


_emitting = threading.Lock()


def emit(event: dict[str, Any]) -> None:
    """Write one event for the run."""
    with _emitting, contextlib.suppress(BrokenPipeError):
        print(json.dumps(event), flush=True)


def _clean_up(segments: set[Path]) -> None:
    """End every process below us, then unlink the shared memory they had mapped."""
    # All of them: an orphan has become our child, whatever session it is in.
    family = psutil.Process().children(recursive=True)
    for segment in segments | end_frozen(family):
        segment.unlink(missing_ok=True)


def end_frozen(processes: list[psutil.Process]) -> set[Path]:
    """Kill the processes; returns what they had mapped.

    They are stopped first, so that none maps more while it is looked for what they have.
    """
    active = [process for process in processes if not _is_tracker(process)]
    for process in active:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    deadline = time.monotonic() + FREEZE_TIMEOUT_S
    while any(map(_runs, active)) and time.monotonic() < deadline:
        time.sleep(0.005)
    segments = mapped_segments(active)
    end_processes(processes, grace_s=0)
    return segments


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return False


def _is_tracker(process: psutil.Process) -> bool:
    """Whether it unlinks what Python processes leave, as soon as the last of them is gone."""
    with contextlib.suppress(psutil.Error):
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    return False


def end_processes(processes: list[psutil.Process], *, grace_s: float = 3.0) -> None:
    """Ask the processes to end, kill what is left after `grace_s`, and let trackers finish."""
    trackers = [process for process in processes if _is_tracker(process)]
    others = [process for process in processes if process not in trackers]
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _kill_after(others, grace_s)
    _kill_after(trackers, TRACKER_TIMEOUT_S)


def _kill_after(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def mapped_segments(processes: list[psutil.Process]) -> set[Path]:
    """Files of /dev/shm that the processes have mapped: vLLM's leak when it is killed."""
    inodes = set[str]()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{SHM}/"):
                    inodes.add(fields[4])
    # By inode: who made a semaphore has mapped it under another name.
    segments = set[Path]()
    for path in SHM.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if str(path.lstat().st_ino) in inodes:
                segments.add(path)
    return segments


def _is_dead(error: Exception) -> bool:
    """Whether a server that has been ready has lost its engine, or has stopped to listen."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500
    return isinstance(getattr(error, "reason", None), ConnectionRefusedError)


def _listener(port: int) -> str:
    """Who listens on a port of this host, in words; empty if nobody does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return ""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and getattr(connection.laddr, "port", None) == port
            ):
                return f"process {connection.pid}"
    return "another process"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _adopt_orphans() -> None:
    """Make grandchildren ours when their parent dies, so that they can be found and reaped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    main()
