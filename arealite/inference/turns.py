"""Nothing holds the event loop for long: what comes all at once is spread over many of its turns.

With a thousand requests in flight, replies arrive in bursts, and rollouts start as many requests at
once. Handled in one turn, each would hold up everything else, such as the pause for an update.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class Spread:
    """Runs functions in the order in which they come, in each turn of the loop only some of them.

    Args:
        per_turn: at most so many in a turn.
        slice_s: in a turn none begins so many seconds after the first.
    """

    def __init__(self, *, per_turn: float = math.inf, slice_s: float = math.inf) -> None:
        self._per_turn, self._slice_s = per_turn, slice_s
        self._waiting = deque[tuple[asyncio.Future[Any], Callable[[], Any]]]()

    async def run(self, work: Callable[[], Result]) -> Result:
        """What the function returns, once it was its turn."""
        loop = asyncio.get_running_loop()
        outcome = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._run_some)
        self._waiting.append((outcome, work))
        return await outcome

    async def wait(self) -> None:
        """Go on in the next turn, or in a later one."""
        await self.run(lambda: None)

    def _run_some(self) -> None:
        until_s, num_run = time.perf_counter() + self._slice_s, 0
        while self._waiting and num_run < self._per_turn and time.perf_counter() < until_s:
            outcome, work = self._waiting.popleft()
            if outcome.cancelled():
                continue
            num_run += 1
            try:
                outcome.set_result(work())
            except Exception as error:
                outcome.set_exception(error)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run_some)
