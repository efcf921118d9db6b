"""Whatever ends a run, its servers end too, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from arealite.errors import ServerError
from arealite.inference.server import _Supervisor
from arealite.inference.transport import region_prefix
from tests.inference.run_with_server import spec

REPOSITORY = Path(__file__).parents[2]


class Run:
    """The run of `run_with_server`, seen from outside."""

    def __init__(self, log_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.inference.run_with_server", str(log_dir)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout
        # Some lines for people come first.
        lines = iter(self.process.stdout.readline, b"")
        ready = json.loads(next(line for line in lines if line.startswith(b"{")))
        self.owner: int = ready["owner"]
        self.family: list[int] = ready["family"]
        self.port = urlsplit(ready["addresses"][0]).port

    def leftovers(self) -> list[str]:
        alive = [pid for pid in self.family if psutil.pid_exists(pid) and is_running(pid)]
        found = [f"process {pid}" for pid in alive]
        found += [str(p) for p in Path("/dev/shm").glob(f"{region_prefix(self.process.pid)}*")]
        connections = psutil.net_connections("inet")
        listening = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
        return found + [f"port {port}" for port in listening & {self.port}]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    assert len(run.family) == 3, "supervisor, server and its child"
    yield run
    run.process.kill()
    run.process.communicate()
    for pid in run.family:
        if psutil.pid_exists(pid) and is_running(pid):
            os.kill(pid, signal.SIGKILL)


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
    assert run.process.wait(10) == 1
    assert run.process.stderr
    assert b"error: The server supervisor was killed" in run.process.stderr.read()
    assert_nothing_is_left(run)


def test_killing_the_server_ends_the_run_with_the_reason(run: Run):
    server = next(pid for pid in run.family if "works" in psutil.Process(pid).cmdline())
    os.kill(server, signal.SIGKILL)
    assert run.process.wait(10) == 1
    assert run.process.stderr
    assert b"error: The vLLM server was killed by signal 9" in run.process.stderr.read()
    assert_nothing_is_left(run)


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path):
    with pytest.raises(ServerError, match=r"exit code 1. Its log .*server-0.log ends:\ncannot fin"):
        _Supervisor(spec(str(tmp_path), "fails"), startup_timeout_s=20)


def test_a_server_that_never_answers_is_given_up_at_the_deadline(tmp_path: Path):
    with pytest.raises(ServerError, match=r"not ready within 1 s. Raise server.startup_timeout_s"):
        _Supervisor(spec(str(tmp_path), "silent", startup_timeout_s=1), startup_timeout_s=1)
