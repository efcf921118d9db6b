"""A clock that jumps: minutes of sleeps and deadlines pass in milliseconds, the same every time.

something can run            ->  it runs, and no time passes
all wait, some for a timer   ->  the clock jumps to the first timer
all wait, some for a thread  ->  it stands still until the thread is done
all wait, for nothing        ->  DeadlineError, at once
"""

import asyncio
import selectors
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from arealite.errors import DeadlineError

Result = TypeVar("Result")


def run_with_virtual_clock(
    coroutine: Coroutine[Any, Any, Result], *, outside_timeout_s: float = 60.0
) -> Result:
    """What the coroutine returns, run as by `asyncio.run` on a loop whose time starts at 0.

    `asyncio.sleep`, `asyncio.timeout` and `asyncio.get_running_loop().time()` go by the virtual
    clock; `time.monotonic()` does not. What runs elsewhere takes no virtual time: a thread, a
    reward in its worker process, an engine with a model. Sockets and subprocesses are not seen,
    and the clock jumps over them; wait for those in `asyncio.to_thread`.

    Example: an agent that thinks for an hour meets its deadline.

        async def episode() -> None:
            async with asyncio.timeout(600):
                await agent.arun_episode(ScriptedEngine(["..."], seconds_per_token=60), row)

        with pytest.raises(TimeoutError):
            run_with_virtual_clock(episode())

    Args:
        outside_timeout_s: how long, in real time, to wait for what runs elsewhere.

    Raises:
        DeadlineError: every task waits, and nothing is left that could wake one of them.
    """
    with asyncio.Runner(loop_factory=lambda: _VirtualClockLoop(outside_timeout_s)) as runner:
        return runner.run(coroutine)


class _VirtualClockLoop(asyncio.SelectorEventLoop):
    """A loop that asks its own selector what time it is."""

    def __init__(self, outside_timeout_s: float) -> None:
        self._clock = _JumpingSelector(outside_timeout_s)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def create_future(self) -> "asyncio.Future[Any]":
        future = super().create_future()
        # Whatever waits for a thread, an executor or another loop comes through wrap_future.
        if sys._getframe(1).f_code is asyncio.wrap_future.__code__:
            self._clock.outside.add(future)
            future.add_done_callback(self._clock.outside.discard)
        return future

    async def shutdown_default_executor(self, *timeout_s: float | None) -> None:
        # Asyncio waits here for a thread of its own.
        self._clock.outside.add(self)
        await super().shutdown_default_executor(*timeout_s)


class _JumpingSelector(selectors.DefaultSelector):
    """Tells the loop that it has waited, as soon as there is nothing to wait for but time."""

    def __init__(self, outside_timeout_s: float) -> None:
        super().__init__()
        self.now_s = 0.0
        self.outside: set[object] = set()  # what runs elsewhere and will wake the loop
        self._outside_timeout_s = outside_timeout_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        can_run = timeout is not None and timeout <= 0
        is_waiting_outside = not can_run and bool(self.outside)
        events = super().select(self._outside_timeout_s if is_waiting_outside else 0)
        if events or can_run:
            return events
        if is_waiting_outside or timeout is None:
            raise DeadlineError(self._describe_wait(is_waiting_outside))
        self.now_s += timeout
        return []

    def _describe_wait(self, is_outside: bool) -> str:
        tasks = (task.get_coro() for task in asyncio.all_tasks())
        names = ", ".join(sorted(getattr(coro, "__qualname__", repr(coro)) for coro in tasks))
        if is_outside:
            return (
                f"A thread or process that {names} waits for took longer than "
                f"{self._outside_timeout_s:g} s of real time. Look for what hangs there, or raise "
                "outside_timeout_s."
            )
        return (
            f"Nothing can run any more: {names} waits for something that no timer, task or thread "
            "will bring. Look for an event that nobody sets, or an engine that nobody resumes."
        )
