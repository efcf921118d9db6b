import asyncio
import re
import threading
import time
from contextlib import suppress

import pytest

from arealite import background, waits
from arealite.errors import DeadlineError
from arealite.waits import note_cut_waits, report, waiting


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "CHECK_EVERY_S", 0.02)


def test_a_report_says_who_waits_for_what_and_where_each_thread_is():
    is_waiting, release = threading.Event(), threading.Event()

    def wait_for_release() -> None:
        with waiting(lambda: "the release"):
            is_waiting.set()
            release.wait(10)

    thread = threading.Thread(target=wait_for_release, name="poor-thread")
    thread.start()
    is_waiting.wait(10)
    with waiting("a test"), waiting("a test"):
        text = report()
    release.set()
    thread.join()
    assert "s  poor-thread: the release" in text
    assert "s  MainThread: a test (2 times)" in text
    assert "Thread poor-thread, innermost call last:" in text
    assert "in wait_for_release" in text
    assert "poor-thread" not in report().partition("Thread ")[0]


def test_a_report_shows_where_tasks_wait_in_the_code_of_the_user():
    release = threading.Event()

    async def ask_a_slow_tool() -> None:
        await asyncio.sleep(0)
        await asyncio.to_thread(release.wait, 10)

    async def agent() -> None:
        await ask_a_slow_tool()

    async def two_agents() -> None:
        await asyncio.gather(agent(), agent())

    future = background.submit(two_agents())
    deadline_s = time.monotonic() + 10
    shared = r"\n2 task\(s\), innermost call last:\n.*, in agent\n.*\n.*, in ask_a_slow_tool\n"
    while not re.search(shared, report()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    release.set()
    future.result(10)


def test_a_wait_that_takes_long_is_reported_again_and_again_at_growing_distances(
    capfd: pytest.CaptureFixture[str],
):
    with waiting("godot", alarm_after_s=0.1), waiting("nothing much", alarm_after_s=float("inf")):
        time.sleep(2)  # the watchdog may sleep for a whole second before it is impatient
    lines = capfd.readouterr().err.splitlines()
    alarms = [line for line in lines if line == "warning: no progress."]
    assert 1 <= len(alarms) <= 6
    assert any("MainThread: godot" in line for line in lines)
    assert any("MainThread: nothing much" in line for line in lines)


def test_a_short_wait_is_never_reported(capfd: pytest.CaptureFixture[str]):
    with waiting("a moment", alarm_after_s=60):
        time.sleep(0.2)
    assert "no progress" not in capfd.readouterr().err


def test_a_wait_of_the_caller_stands_in_the_report_of_its_deadline(
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(DeadlineError, match=r"a long sleep took longer than 0 s. What it waits"):
        background.run(asyncio.sleep(10), timeout_s=0.1, what="a long sleep")
    assert "s  MainThread: a long sleep" in capsys.readouterr().err


def test_what_a_cancelled_task_was_waiting_for_is_told():
    async def one() -> None:
        with waiting("the whole"), waiting("a part"):
            await asyncio.sleep(10)

    async def both() -> str:
        cut = note_cut_waits()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.gather(one(), one())
        return cut()

    assert asyncio.run(both()) == "a part (2 times, for 0 s); the whole (2 times, for 0 s)"


def test_a_wait_that_ends_by_itself_is_not_told_of():
    async def one() -> str:
        cut = note_cut_waits()
        with waiting("a moment"):
            await asyncio.sleep(0)
        with suppress(KeyError), waiting("a value"):
            raise KeyError
        return cut()

    assert asyncio.run(one()) == ""
