"""The process that owns the servers of a run, and outlives whatever may kill the run.

    run ──stdin──> supervisor ──> server 0, server 1, ... each with its engine and workers
        <─stdout─  one JSON event per line: ready, failed, died

The run holds the other end of stdin; when it closes, for whatever reason, everything goes:
processes, ports, shared memory, temporary files. A supervisor that is killed itself takes the
servers along, through the lifeline of `vllm_plugin`.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from arealite.errors import ServerError
from arealite.inference.vllm_plugin import LIFELINE

SHM = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Spec:
    """What to start; the run sends it as the first line on stdin."""

    commands: list[list[str]]
    """Command line of each server, with `{port}` where its port belongs."""
    environments: list[dict[str, str]]
    """Per server, variables on top of the run's own."""
    log_dir: str
    startup_timeout_s: float
    region_prefix: str
    """Shared regions whose names begin so belong to the run."""


@dataclass
class Server:
    """One vLLM API server and everything below it."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_tail(self, lines: int = 25) -> str:
        """The end of what the server printed."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


class RunClosedError(Exception):
    """The run closed its end of the pipe: time to clean up."""


def main() -> None:
    """Serve one run: start, report, watch, clean up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes stdin
    signal.signal(signal.SIGTERM, lambda *_: _raise_closed())
    _adopt_orphans()
    scratch = Path(tempfile.mkdtemp(prefix="arealite-"))
    servers: list[Server] = []
    segments = set[Path]()
    spec: Spec | None = None
    try:
        spec = Spec(**json.loads(_read_line()))
        _start_all(spec, scratch, servers)
        segments = mapped_segments(psutil.Process().children(recursive=True))
        _emit(
            {
                "event": "ready",
                "addresses": [server.address for server in servers],
                "segments": [str(segment) for segment in segments],
            }
        )
        _watch(servers)
    except ServerError as error:
        _emit({"event": "failed", "message": str(error)})
    except RunClosedError:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _clean_up(segments, spec.region_prefix if spec else None)
        shutil.rmtree(scratch, ignore_errors=True)


def _start_all(spec: Spec, scratch: Path, servers: list[Server]) -> None:
    """Start every server and wait until each has generated its first tokens."""
    deadline = time.monotonic() + spec.startup_timeout_s
    for index in range(len(spec.commands)):
        servers.append(_start(spec, index, scratch))
        _emit({"event": "started", "pid": servers[-1].process.pid})
    for server in servers:
        while not _is_ready(server):
            _check_alive(server)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The server was not ready within {spec.startup_timeout_s:.0f} s. Raise "
                    f"server.startup_timeout_s, or see {server.log}, which ends:\n"
                    f"{server.log_tail()}"
                )
            _wait(0.2)


def _start(spec: Spec, index: int, scratch: Path) -> Server:
    port = _free_port()
    log = Path(spec.log_dir) / f"server-{index}.log"
    # The lifeline ends vLLM's grandchildren; its sockets and temporary files go to our scratch.
    environment = os.environ | spec.environments[index]
    environment |= {
        LIFELINE: str(os.getpid()),
        "VLLM_RPC_BASE_PATH": str(scratch),
        "TMPDIR": str(scratch),
    }
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in spec.commands[index]],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    return Server(process=process, port=port, log=log)


def _watch(servers: list[Server]) -> None:
    """Return only by an error: a server died, or the run closed the pipe."""
    while True:
        _wait(0.5)
        for server in servers:
            _check_alive(server)


def _check_alive(server: Server) -> None:
    code = server.process.poll()
    if code is not None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise ServerError(f"The vLLM server {how}. Its log {server.log} ends:\n{server.log_tail()}")


def _is_ready(server: Server) -> bool:
    """Whether the server samples tokens: `/health` is fine long before, and long after, it can.

    Several requests at once, with log-probs: what vLLM compiles for them on first use takes
    seconds, in which no other request, nor a pause, is heard.
    """
    if not _generates(server):
        return False
    with ThreadPoolExecutor(4) as pool:
        return all(pool.map(_generates, [server] * 4))


def _generates(server: Server) -> bool:
    # Eight tokens, because a first prompt of one token has been seen to kill a CPU worker.
    body = {"token_ids": [1] * 8, "sampling_params": {"max_tokens": 4, "logprobs": 0}}
    request = urllib.request.Request(
        server.address + "/inference/v1/generate",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return bool(json.load(reply)["choices"][0]["token_ids"])
    except (OSError, ValueError, LookupError):
        return False


def _wait(seconds: float) -> None:
    """Sleep, but leave at once when the run closes the pipe."""
    if select.select([sys.stdin], [], [], seconds)[0] and not os.read(sys.stdin.fileno(), 4096):
        raise RunClosedError


def _read_line() -> str:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            raise RunClosedError
        line += byte
    return line.decode()


def _emit(event: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(event), flush=True)


def _raise_closed() -> None:
    raise RunClosedError


def _clean_up(segments: set[Path], region_prefix: str | None) -> None:
    """End every process below us, then unlink the shared memory they had mapped."""
    # All of them: an orphan has become our child, whatever session it is in.
    family = psutil.Process().children(recursive=True)
    segments = segments | mapped_segments(family)
    end_processes(family)
    if region_prefix is not None:
        segments |= set(SHM.glob(f"{region_prefix}*"))
    for segment in segments:
        segment.unlink(missing_ok=True)


def end_processes(processes: list[psutil.Process], *, grace_s: float = 3.0) -> None:
    """Ask the processes to end, and kill what is left after `grace_s`."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def mapped_segments(processes: list[psutil.Process]) -> set[Path]:
    """Files of /dev/shm that the processes have mapped: vLLM's leak when it is killed."""
    segments = set[Path]()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{SHM}/"):
                    segments.add(Path(fields[5].removesuffix(" (deleted)")))
    return segments


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
