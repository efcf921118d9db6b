"""The oracle notices each of the five things that it is there for."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from arealite.errors import ConfigError, RolloutError, ServerError
from arealite.rewards.pool import score
from arealite.testing import ScriptedEngine
from arealite.types import LostRow
from arealite.waits import waiting
from tests.faults.training import ROWS, asking
from tests.oracle import Ledger, Oracle, Surroundings, held_locks

pytestmark = pytest.mark.usefixtures("all_started")


def scripted_engine() -> ScriptedEngine:
    return ScriptedEngine(replies=lambda conversation: "fine")


# --- Part 1: nothing is left behind ---------------------------------------------------------------


def sleeping_process() -> Callable[[], object]:
    process = subprocess.Popen(["sleep", "60"])

    def end() -> None:
        process.kill()
        process.wait()

    return end


def orphan() -> Callable[[], object]:
    """A process whose parent is gone."""
    done = subprocess.run("sleep 60 > /dev/null & echo $!", shell=True, stdout=-1, check=True)
    return lambda: os.kill(int(done.stdout), signal.SIGKILL)


def listening_port() -> Callable[[], object]:
    return socket.create_server(("127.0.0.1", 0)).close


def segment() -> Callable[[], object]:
    path = Path(f"/dev/shm/arealite-oracle-{time.monotonic_ns()}")
    path.touch()
    return path.unlink


def thread() -> Callable[[], object]:
    released = threading.Event()
    threading.Thread(target=released.wait).start()
    return released.set


def thread_of_ours() -> Callable[[], object]:
    released = threading.Event()
    threading.Thread(target=released.wait, name="arealite-servers", daemon=True).start()
    return released.set


@pytest.mark.parametrize(
    ("leave", "named"),
    [
        (sleeping_process, "processes: .*sleep"),
        (orphan, "processes: .*sleep"),
        (listening_port, r"ports: \d"),
        (segment, "/dev/shm/arealite-oracle-"),
        (thread, "threads: Thread-"),
        (thread_of_ours, "threads: arealite-servers"),
    ],
)
def test_what_is_left_behind_is_named(
    leave: Callable[[], Callable[[], object]], named: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Surroundings.assert_unchanged, "__defaults__", (0.2,))
    oracle = Oracle()
    oracle.__enter__()
    remove = leave()
    try:
        with pytest.raises(AssertionError, match=f"left behind: .*{named}"):
            oracle.__exit__(None)
    finally:
        remove()


def test_a_lock_is_held_by_one_however_many_wait_for_it(tmp_path: Path):
    wait_for_it = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX)"
    path = tmp_path / "lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiter = subprocess.Popen([sys.executable, "-c", wait_for_it, path])
        while f"-> FLOCK  ADVISORY  WRITE {waiter.pid} " not in Path("/proc/locks").read_text():
            time.sleep(0.01)
        [lock] = held_locks({os.getpid()})
        assert lock.startswith("FLOCK")
        assert held_locks({os.getpid(), waiter.pid}) == {lock}
    assert waiter.wait() == 0


def test_workers_of_the_default_reward_pool_are_ended():
    with Oracle():
        assert asyncio.run(score(lambda text, row: 1.0, "", {})) == 1.0


# --- Parts 2 and 3: the ledger --------------------------------------------------------------------


def test_a_run_that_trains_has_a_ledger_that_balances():
    with Oracle() as oracle:
        ledger = oracle.train(scripted_engine(), asking(), ROWS, steps=3)
    assert sorted(ledger.trained) == list(range(12))
    assert ledger.steps == {1: 4, 2: 4, 3: 4}
    assert ledger.submitted == 12 + len(ledger.in_flight)
    assert ledger.lost == {}


@pytest.mark.parametrize(
    ("ledger", "complaint"),
    [
        (Ledger(submitted=2, in_flight={0}), r"rows lost: \[1\]"),
        (Ledger(submitted=1, trained=Counter([0]), in_flight={0}), r"used twice: \[0\]"),
        (Ledger(submitted=0, in_flight={0}), r"never started: \[0\]"),
        (Ledger(max_age=2, max_staleness=1), "a token of age 2"),
    ],
)
def test_books_that_do_not_balance_fail_the_test(ledger: Ledger, complaint: str):
    with pytest.raises(AssertionError, match=complaint), Oracle() as oracle:
        oracle._ledgers.append(ledger)


def test_a_lost_row_is_accounted_for_with_its_reason():
    ledger = Ledger(submitted=1)
    ledger.add_lost([LostRow(place=0, reason="rejected")])
    ledger.check()
    assert ledger.reasons == {0: "rejected"}


def test_a_run_that_fails_is_judged_too():
    async def raising(text: str, row: dict) -> float:
        raise OSError("no luck")

    with Oracle() as oracle, oracle.ends_with(RolloutError, "7 of the latest 7 episodes failed"):
        oracle.train(scripted_engine(), asking(raising), ROWS)
    [ledger] = oracle._ledgers
    assert ledger.submitted > 0


# --- Part 4: one line names the cause -------------------------------------------------------------


def test_another_error_or_none_is_not_the_ending_that_was_said():
    oracle = Oracle()
    with pytest.raises(pytest.fail.Exception), oracle.ends_with(ServerError, "gone"):
        pass
    with pytest.raises(ConfigError), oracle.ends_with(ServerError, "gone"):
        raise ConfigError("gone")
    with pytest.raises(AssertionError, match="first line"), oracle.ends_with(ServerError, "gone"):
        raise ServerError("first line\nIts log ends: gone")
    with oracle.ends_with(ServerError, "gone"):
        raise ServerError("All are gone.\nIts log ends:")


# --- Part 5: in time ------------------------------------------------------------------------------


def test_what_hangs_fails_with_who_waits_for_what():
    with (
        pytest.raises(pytest.fail.Exception, match=r"(?s)longer than 0.2 s.*MainThread: godot"),
        Oracle(deadline_s=0.2),
        waiting("godot"),
    ):
        threading.Event().wait(60)


def test_a_deadline_that_something_swallowed_fails_the_test_at_its_end():
    with (
        pytest.raises(AssertionError, match=r"took longer than 0.2 s"),
        Oracle(deadline_s=0.2),
        contextlib.suppress(BaseException),
    ):
        time.sleep(60)
