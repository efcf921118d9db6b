"""Whatever ends a server, it comes back; whatever ends a run, its servers end and leave nothing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from arealite.errors import ServerError
from arealite.inference import supervisor
from arealite.inference.server import _Supervisor
from tests.inference.run_with_server import segment_name, spec

REPOSITORY = Path(__file__).parents[2]


class Run:
    """The run of `run_with_server`, seen from outside."""

    def __init__(self, log_dir: Path, mode: str = "works") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.inference.run_with_server", str(log_dir), mode],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout
        # Some lines for people come first.
        self.lines = iter(self.process.stdout.readline, b"")
        ready = json.loads(next(line for line in self.lines if line.startswith(b"{")))
        self.owner: int = ready["owner"]
        self.family: list[int] = ready["family"]
        self.port = urlsplit(ready["addresses"][0]).port

    def server(self) -> psutil.Process:
        """The fake server that listens now."""
        for process in psutil.Process(self.owner).children():
            if any("fake_server" in part for part in process.cmdline()):
                return process
        raise AssertionError("no server")

    def read_until(self, pattern: bytes) -> bytes:
        return next(line for line in self.lines if re.search(pattern, line))

    def leftovers(self) -> list[str]:
        alive = [pid for pid in self.family if psutil.pid_exists(pid) and is_running(pid)]
        found = [f"process {pid}" for pid in alive]
        found += [str(p) for p in Path("/dev/shm").glob(f"{segment_name(self.process.pid)}*")]
        connections = psutil.net_connections("inet")
        listening = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
        return found + [f"port {port}" for port in listening & {self.port}]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start_one(mode: str = "works") -> Run:
        runs.append(Run(tmp_path, mode))
        return runs[-1]

    yield start_one
    for run in runs:
        run.process.kill()
        run.process.communicate()
        assert_nothing_is_left(run)


@pytest.fixture
def run(start: Callable[..., Run]) -> Run:
    run = start()
    assert len(run.family) == 3, "supervisor, server and its child"
    return run


def assert_nothing_is_left(run: Run) -> None:
    deadline = time.monotonic() + 10
    while run.leftovers():
        assert time.monotonic() < deadline, run.leftovers()
        time.sleep(0.05)


def test_killing_the_run_ends_its_servers(run: Run):
    run.process.kill()
    run.process.wait()
    assert_nothing_is_left(run)


def test_killing_the_supervisor_ends_the_servers_and_the_run(run: Run):
    os.kill(run.owner, signal.SIGKILL)
    assert run.process.wait(15) == 1
    assert run.process.stderr
    assert b"error: The server supervisor was killed" in run.process.stderr.read()
    assert_nothing_is_left(run)


@pytest.mark.fault(2, "kill -9 of the parent of a process that ignores SIGTERM")
def test_a_killed_server_is_started_again_on_its_port_without_what_it_left(run: Run):
    server = run.server()
    orphan = next(pid for pid in run.family if pid not in (run.owner, server.pid))
    killed_s = time.monotonic()
    server.kill()
    assert b"killed by signal 9" in run.read_until(b"warning: ")
    while is_running(orphan):
        assert time.monotonic() < killed_s + 5
        time.sleep(0.02)
    assert f":{run.port} serves again".encode() in run.read_until(b"serves again")
    assert run.server().pid != server.pid


@pytest.mark.fault(4, "SIGSTOP of a server")
def test_a_server_that_hangs_is_killed_and_started_again(run: Run):
    server = run.server()
    server.suspend()
    stopped_s = time.monotonic()
    assert b"did not answer for" in run.read_until(b"warning: ")
    assert time.monotonic() - stopped_s < 8
    run.read_until(b"serves again")
    assert run.server().pid != server.pid


@pytest.mark.fault(5, "SIGSTOP of a server for 1.5 s")
def test_a_server_that_stalls_for_a_moment_is_left_alone(run: Run):
    server = run.server()
    server.suspend()
    time.sleep(1.5)
    server.resume()
    time.sleep(4)
    assert run.server().pid == server.pid


@pytest.mark.fault(8, "a server that dies 1 s after each start")
def test_a_server_that_dies_again_and_again_ends_the_run_with_its_log(start: Callable[..., Run]):
    run = start("dies soon")
    assert run.process.wait(30) == 1
    assert run.process.stderr
    message = run.process.stderr.read().decode()
    assert re.search(
        r"(?s)error: http://\S+ died 3 times within 10 min.*killed by signal 6", message
    )
    assert "server-0.log ends:" in message
    assert_nothing_is_left(run)


@pytest.mark.fault(7, "a server that ends at once")
def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path):
    with pytest.raises(ServerError, match=r"exit code 1. Its log .*server-0.log ends:\ncannot fin"):
        _Supervisor(spec(str(tmp_path), "fails"), startup_timeout_s=20)


@pytest.mark.fault(7, "a server that only sleeps")
def test_a_server_that_never_answers_is_given_up_at_the_deadline(tmp_path: Path):
    with pytest.raises(ServerError, match=r"not ready within 1 s. Raise server.startup_timeout_s"):
        _Supervisor(spec(str(tmp_path), "silent", startup_timeout_s=1), startup_timeout_s=1)


@pytest.mark.fault(10, "a server whose first start finds its port taken")
def test_a_port_taken_between_the_choice_and_the_start_is_replaced_by_another(tmp_path: Path):
    running = _Supervisor(spec(str(tmp_path), "port taken once"), startup_timeout_s=20)
    assert (tmp_path / "marker").exists()
    running.close()


@pytest.mark.fault(9, "a socket that listens on the port")
def test_a_port_that_somebody_listens_on_is_named_with_its_owner():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert supervisor._listener(port) == f"process {os.getpid()}"
    assert supervisor._listener(port) == ""


def test_what_python_processes_leave_is_unlinked_by_their_tracker_which_is_given_time_for_it():
    code = """if True:
        import multiprocessing, signal
        context = multiprocessing.get_context("spawn")
        locks = [context.Lock() for _ in range(500)]
        print(*(lock._semlock.name for lock in locks), flush=True)
        signal.pause()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as family:
        assert family.stdout
        names = family.stdout.readline().split()
        semaphores = [Path(f"/dev/shm/sem.{name.removeprefix('/')}") for name in names]
        [tracker] = psutil.Process(family.pid).children()
        tracker.suspend()  # or it would be done before it is looked at
        family.kill()
    assert all(semaphore.exists() for semaphore in semaphores)
    tracker.resume()
    supervisor.end_frozen([tracker])
    assert not any(semaphore.exists() for semaphore in semaphores)
    assert not tracker.is_running()
