"""Who waits for what, since when: so that nothing hangs without a word.

    with waiting("the groups of step 7"):
        ...

A wait that takes long is reported on stderr, together with all others of this process and the
stacks of its threads and asyncio tasks; again after twice the time, and so on.
"""

import asyncio
import contextvars
import itertools
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

ALARM_AFTER_S = 120.0
CHECK_EVERY_S = 1.0
MAX_LINES = 20
"""Of one report; waits with the same words share a line."""
MAX_FRAMES = 12
MAX_TASK_STACKS = 10
"""Of one report; tasks that are at the same place share one."""


@dataclass(slots=True)
class _Wait:
    what: str | Callable[[], str]
    thread: str
    since_s: float
    alarm_s: float


_waits: dict[int, _Wait] = {}
_CutShort = list[tuple[str, float]]
"""What was waited for, and for how many seconds."""
_cut_short: contextvars.ContextVar[_CutShort | None] = contextvars.ContextVar("cut", default=None)
_loops: list[asyncio.AbstractEventLoop] = []
_next_key = itertools.count()
_watchdog: threading.Thread | None = None
_starting = threading.Lock()


@contextmanager
def waiting(
    what: str | Callable[[], str], *, alarm_after_s: float = ALARM_AFTER_S
) -> Iterator[None]:
    """Let the body be known as a wait, in threads and coroutines alike.

    Args:
        what: what is waited for, in words; or a function that says so at the time of a report.
        alarm_after_s: inf: only listed when another wait gives the alarm.
    """
    _start_watchdog()
    key = next(_next_key)
    since_s = time.monotonic()
    wait = _Wait(what, threading.current_thread().name, since_s, since_s + alarm_after_s)
    _waits[key] = wait
    try:
        yield
    except asyncio.CancelledError:
        if (cut := _cut_short.get()) is not None:
            cut.append((_in_words(wait), time.monotonic() - since_s))
        raise
    finally:
        del _waits[key]


def note_cut_waits() -> Callable[[], str]:
    """What this task, and those it starts, will have been waiting for when they are cancelled."""
    cut: _CutShort = []
    _cut_short.set(cut)
    return lambda: "; ".join(_grouped(cut))


def _grouped(cut: _CutShort) -> Iterator[str]:
    """The waits, those with the same words as one, with the longest of them."""
    groups: dict[str, list[float]] = {}
    for what, age_s in cut:
        groups.setdefault(what, []).append(age_s)
    for what, ages_s in groups.items():
        count = f"{len(ages_s)} times, " if ages_s[1:] else ""
        yield f"{what} ({count}for {max(ages_s):.0f} s)"


def watch_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Let every report show where the tasks of this loop are."""
    _loops.append(loop)


def report() -> str:
    """All waits of this process, the oldest first, and where its threads and tasks are."""
    now_s = time.monotonic()
    groups: dict[tuple[str, str], list[float]] = {}
    for wait in sorted(list(_waits.values()), key=lambda wait: wait.since_s):
        groups.setdefault((wait.thread, _in_words(wait)), []).append(now_s - wait.since_s)
    lines = [
        f"  {ages[0]:7.1f} s  {thread}: {what}" + (f" ({len(ages)} times)" if ages[1:] else "")
        for (thread, what), ages in itertools.islice(groups.items(), MAX_LINES)
    ]
    if len(groups) > MAX_LINES:
        lines.append(f"  and {len(groups) - MAX_LINES} more")
    return "\n".join(["Who waits for what, since when:", *lines, "", *_stacks(), *_task_stacks()])


def _in_words(wait: _Wait) -> str:
    if isinstance(wait.what, str):
        return wait.what
    try:
        return wait.what()
    except Exception as error:  # it may look at what another thread is changing
        return f"something that cannot be described now ({type(error).__name__})"


def _stacks() -> Iterator[str]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield f"Thread {names.get(ident, ident)}, innermost call last:"
        yield "".join(traceback.format_stack(frame)[-MAX_FRAMES:]).rstrip()


def _task_stacks() -> Iterator[str]:
    tasks = [task for loop in _loops for task in asyncio.all_tasks(loop)]
    places = Counter(place for task in tasks if (place := _place_of(task.get_coro())))
    for place, count in places.most_common(MAX_TASK_STACKS):
        yield f"{count} task(s), innermost call last:"
        yield place


def _place_of(awaited: Any) -> str:
    """The stack of a suspended coroutine: its own frame, that of what it awaits, and so on."""
    frames: list[tuple[FrameType, int]] = []
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            frames.append((frame, frame.f_lineno))
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    summary = traceback.StackSummary.extract(iter(frames))
    return "".join(summary.format()[-MAX_FRAMES:]).rstrip()


def _start_watchdog() -> None:
    global _watchdog
    if _watchdog is not None and _watchdog.is_alive():
        return
    with _starting:
        if _watchdog is None or not _watchdog.is_alive():
            _watchdog = threading.Thread(target=_watch, name="arealite-watchdog", daemon=True)
            _watchdog.start()


def _watch() -> None:
    while True:
        time.sleep(CHECK_EVERY_S)
        now_s = time.monotonic()
        overdue = [wait for wait in list(_waits.values()) if now_s > wait.alarm_s]
        for wait in overdue:
            wait.alarm_s = now_s + (now_s - wait.since_s)
        if overdue:
            print(f"warning: no progress.\n{report()}", file=sys.stderr, flush=True)
