"""A thread of its own for an event loop: servers of tests answer while the tests block."""

import asyncio
import concurrent.futures
import socket
import threading
from asyncio.trsock import TransportSocket
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from arealite.errors import DeadlineError

Result = TypeVar("Result")

TIMEOUT_S = 30.0
SETTLE_S = 0.01
"""After a server has stopped to accept: connections that were on their way in have arrived."""


async def stop_accepting(listeners: Iterable[socket.socket | TransportSocket]) -> None:
    """To be awaited before their server is closed; what has come in by then is served.

    Python 3.11 loses a connection that it has accepted while its server is closed: nobody answers
    on it, and nobody closes it.
    """
    for listener in listeners:
        asyncio.get_running_loop().remove_reader(listener.fileno())
    await asyncio.sleep(SETTLE_S)


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
