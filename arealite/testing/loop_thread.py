"""A thread of its own for an event loop: servers of tests answer while the tests block."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from arealite.errors import DeadlineError

Result = TypeVar("Result")

TIMEOUT_S = 30.0
SETTLE_S = 0.01
"""After a server has stopped to listen: connections that were on their way in have arrived."""


class LoopThread:
    """Runs one event loop until it is closed."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Result of the coroutine, for which the calling thread waits.

        Raises:
            DeadlineError: it took longer than half a minute.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(TIMEOUT_S)
        except concurrent.futures.TimeoutError as error:
            if future.done():  # the coroutine's own TimeoutError, not ours
                raise
            future.cancel()
            raise DeadlineError(
                f"The thread {self._thread.name} did not do its work within {TIMEOUT_S:.0f} s. "
                "Does a function that the test gave it block?"
            ) from error

    def close(self) -> None:
        """Cancel what still runs there, and wait for the end of the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        # On its way out the runner cancels all tasks and closes the loop.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()
