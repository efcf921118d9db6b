"""One event loop in a thread of its own, for everything asynchronous that synchronous code starts.

Rollouts run here while the main thread trains, and a notebook, whose own loop is busy, can call
synchronous functions that need one.
"""

import asyncio
import concurrent.futures
import random
import selectors
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from arealite.errors import DeadlineError
from arealite.waits import report, waiting, watch_tasks

SOCKETS_PER_TURN = 64

Result = TypeVar("Result")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The loop of this process, started on first use."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.SelectorEventLoop(_FewAtOnce())
            watch_tasks(_loop)
            threading.Thread(target=_run, args=(_loop,), name="arealite-loop", daemon=True).start()
        return _loop


class _FewAtOnce(selectors.DefaultSelector):
    """Tells of a few sockets in each turn of the loop, of any if there are more.

    After a short hold-up a thousand may be ready. To serve them all would hold up the loop longer,
    and then more of them are ready. Nothing is lost: what is not told of is ready again at once.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout)
        return random.sample(ready, SOCKETS_PER_TURN) if len(ready) > SOCKETS_PER_TURN else ready


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Run for ever: an episode that calls sys.exit ends by it, and must not end all others."""
    while True:
        try:
            return loop.run_forever()
        except BaseException:  # its task has it as its exception by now
            continue


def submit(coroutine: Coroutine[Any, Any, Result]) -> "concurrent.futures.Future[Result]":
    """Start a coroutine on the loop; the future is the handle to wait for or to cancel."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop())


def run(coroutine: Coroutine[Any, Any, Result], *, timeout_s: float, what: str) -> Result:
    """Result of a coroutine that runs on the loop while the calling thread waits.

    Raises:
        DeadlineError: it took longer than `timeout_s`; it names `what`.
    """
    future = submit(coroutine)
    with waiting(what):
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            if future.done():  # the coroutine's own TimeoutError, not ours
                raise
            print(report(), file=sys.stderr, flush=True)
            raise DeadlineError(
                f"{what} took longer than {timeout_s:.0f} s. What it waits for stands above. If it "
                "is a workflow that blocks the event loop: await what takes time, or run it in "
                "asyncio.to_thread. A reward may be a plain `def`, which runs in its own process."
            ) from error
        finally:
            future.cancel()


async def in_thread(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """What a function returns that would block the loop, from a thread of its own.

    Unlike those of asyncio.to_thread, these are as many as are asked for, and one that hangs does
    not keep Python from ending. Nothing stops it when its caller is cancelled.
    """
    outcome: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            outcome.set_result(function(*args, **kwargs))
        except StopIteration as error:  # which no future takes
            outcome.set_exception(RuntimeError(f"it raised {error!r}"))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="arealite-call", daemon=True).start()
    return await asyncio.wrap_future(outcome)
